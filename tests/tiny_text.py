"""Tiny text models of many families (hidden 32, two or three layers), made from configuration: no network.

`build_causal("qwen2")` is the model; `build_causal("qwen2", directory)` writes model and tokenizer there as
`save_pretrained` does and gives the folder. Sliding windows (of 6 tokens) are shorter than the rows of most tests.
"""

from __future__ import annotations

from pathlib import Path

from tiny import HIDDEN, build_tokenizer

VOCABULARY = 344  # the tokenizer's, rounded up to a multiple of 8
WINDOW = 6

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
    **_HEADS,
}
_GPT = {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY,
        "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}

# family -> (name of the configuration class, without "Config"; what differs from the common figures)
_FAMILIES: dict[str, tuple[str, dict]] = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": WINDOW}),
    "gemma3_text": (
        "Gemma3",
        {"head_dim": 8, "sliding_window": WINDOW, "num_hidden_layers": 3,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gpt2": ("GPT2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt_neox": ("GPTNeoX", {}),
    "phi": ("Phi", {}),
    "falcon": ("Falcon", {"alibi": False, **_NO_DROPOUT}),
    "falcon_alibi": ("Falcon", {"alibi": True, "new_decoder_architecture": False, **_NO_DROPOUT}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4, **_NO_DROPOUT}),
    "mamba": ("Mamba", {"state_size": 4, "expand": 2, "conv_kernel": 3}),
    "qwen3_next": (
        "Qwen3Next",
        {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
         "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)


def _config(family: str):
    import transformers as t

    name, changed = _FAMILIES[family]
    if name.startswith("Gemma3"):
        return t.Gemma3TextConfig(**{**_COMMON, **changed})
    common = _GPT if name == "GPT2" else _COMMON
    return getattr(t, f"{name}Config")(**{**common, **changed})


def build_causal(family: str, directory: str | Path | None = None, *, attention: str | None = None):
    """A tiny causal model of `family` (one of FAMILIES) in evaluation mode; its weights are seeded.

    They are larger than a fresh model's, so that what a token attends to shows in the figures.

    Args:
        directory: write the model and a tokenizer with a chat template there; the folder is returned.
        attention: `sdpa` or `eager`; None: the model's default.
    """
    import torch
    import transformers as t

    config = _config(family)
    if attention is not None:
        config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4)
    if directory is None:
        return model
    tokenizer = build_tokenizer(["<|im_start|>", "<|im_end|>"], bos=None, eos="<|im_end|>", pad="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] + '\n' + message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)
