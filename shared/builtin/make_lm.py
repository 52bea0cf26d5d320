"""Make the files of the built-in language models again: `python -m shared.builtin.make_lm`.

Writes configuration, tokenizer and chat template of `lm_small/`, `lm_small_sft/` and `gemma3_small/`, trains
`builtin/lm-small-sft` (about a minute and a half on one core) and writes its weights and what it reaches. On the same
machine and versions the weights come out the same. The loop is bare on purpose: this package imports no trainer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shared.builtin import MODELS, arithmetic, reviews, train_lm
from shared.builtin.make import ENGLISH

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

VOCABULARY = 600
WIDTH = 128
LAYERS = 3
HEADS = 4
POSITIONS = 2048  # tokens
PAD, END = "<pad>", "<end>"
ROLES = ("<system>", "<user>", "<assistant>", "<tool>")

# One token a turn mark. The generation marks cover what the assistant has to produce: its text, the tools it calls and
# the end of its turn.
CHAT_TEMPLATE = """\
{%- macro body(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content or [] -%}
            {%- if part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception('this model takes text, not ' ~ part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
    {{- '<system>Tools: ' ~ tools | tojson ~ '<end>' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] not in ('system', 'user', 'assistant', 'tool') -%}
        {{- raise_exception('unknown role ' ~ message['role']) -}}
    {%- endif -%}
    {{- '<' ~ message['role'] ~ '>' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- body(message['content']) -}}
            {%- if message['tool_calls'] -%}
                {{- 'Call: ' ~ message['tool_calls'] | tojson -}}
            {%- endif -%}
            {{- '<end>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- body(message['content']) ~ '<end>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<assistant>' -}}
{%- endif -%}
"""


NAMES = ("builtin/lm-small", "builtin/lm-small-sft", "builtin/gemma3-small")


def main() -> None:
    for name in NAMES:
        make_files(name, MODELS[name])
    train_lm.make_weights(MODELS[train_lm.TRAINED])


def make_files(name: str, directory: Path) -> None:
    """Write configuration, tokenizer and chat template of the built-in language model `name`."""
    from transformers import GenerationConfig

    tokenizer = make_tokenizer()
    config = gemma_config(tokenizer) if name == "builtin/gemma3-small" else llama_config(tokenizer)
    if name == train_lm.TRAINED:  # of what its weights are held in, a processor is slower
        config.dtype = "float32"
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id).save_pretrained(directory)


def llama_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """A Llama of some 0.7 million parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(**_size(tokenizer), num_key_value_heads=HEADS, architectures=["LlamaForCausalLM"])


def gemma_config(tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """A Gemma 3 text model as small, two of its three layers with a sliding window, as in the real ones most are."""
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        **_size(tokenizer),
        num_key_value_heads=1,
        head_dim=WIDTH // HEADS,
        query_pre_attn_scalar=WIDTH // HEADS,
        sliding_window=64,
        layer_types=["sliding_attention"] * (LAYERS - 1) + ["full_attention"],
        architectures=["Gemma3ForCausalLM"],
    )


def _size(tokenizer: PreTrainedTokenizerFast) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.06,  # larger than the usual 0.02: at this width the signal would fade
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: built-in texts in few tokens, any other text in more, each digit its own."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # The space before a number is a token too: " 4" would be another token than "4", and arithmetic learnt twice.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*built_in_texts() * 8, *ENGLISH.splitlines()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        padding_side="right",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def built_in_texts() -> list[str]:
    """The questions and sentences that the built-in text data are made of."""
    words = [*reviews.NAME_ADJECTIVES, *reviews.NAME_NOUNS, *reviews.ASPECTS, *reviews.LEXICON]
    texts = [f" {word}" for word in words]
    texts += [reviews.PROMPT, *(f" {form}" for form in reviews.FORMS), "Work out 1 + 2 - 3 step by step."]
    for sign, word, _ in arithmetic.OPERATIONS.values():
        texts += [phrasing.format(a=1, b=2, sign=sign, word=word) for phrasing in arithmetic.PHRASINGS]
    return texts


if __name__ == "__main__":
    main()
