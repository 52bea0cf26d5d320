"""Frozen copies: whole, or with lower layers that are held once and computed once."""

import copy

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from shared.errors import UserError
from shared.runtime.references import create_reference_model, shared_layers

WIDTHS = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
          "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2}  # fmt: skip
SMALL = {**WIDTHS, "num_key_value_heads": 2}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, sliding_window=4)),
    "gpt2, with dropout": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=16, n_layer=4, n_head=2)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**WIDTHS)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**WIDTHS, ffn_dim=32, word_embed_proj_dim=8, dropout=0.1)),
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 0, 0, 0]])
BATCH = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "use_cache": False}


def made(kind="llama"):
    torch.manual_seed(0)
    return MODELS[kind]()


def stack(model):
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 4)


def count_calls(model):
    """How often each layer's computation ran: counted in its first linear map or attention."""
    calls = [0] * 4

    def counting(number):
        def hook(*_):
            calls[number] += 1

        return hook

    for number, layer in enumerate(stack(model)):
        norm = next(m for m in layer.modules() if "Norm" in type(m).__name__)
        norm.register_forward_hook(counting(number))
    return calls


def trained_a_step(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(**BATCH, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_copy_is_frozen_and_stays_as_it_was():
    model = made().train()
    reference = create_reference_model(model)
    before = reference(**BATCH).logits
    trained_a_step(model)
    assert torch.equal(reference(**BATCH).logits, before) and not torch.equal(model(**BATCH).logits, before)
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert shared_layers(reference) == 0


@pytest.mark.parametrize("kind", MODELS)
def test_shared_layers_are_held_once_and_computed_once(kind):
    model = made(kind).train()
    whole = copy.deepcopy(model).eval()
    reference = create_reference_model(model, num_shared_layers=3)
    mine, theirs = count_calls(model), count_calls(reference)
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in reference.parameters()}
    below = [p for layer in stack(model)[:3] for p in layer.parameters()] + [model.get_input_embeddings().weight]
    above = list(stack(model)[3].parameters())
    assert {p.data_ptr() for p in below} <= shared and not {p.data_ptr() for p in above} & shared
    assert shared_layers(reference) == 3
    assert not any(p.requires_grad for p in below) and all(p.requires_grad for p in above)

    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    for _ in range(2):  # the policy's dropout, where it has any, does not reach the reference
        trained_a_step(model)
        with torch.no_grad():
            assert torch.allclose(reference(**BATCH).logits, whole(**BATCH).logits, atol=1e-6)
    assert mine == [2] * 4 and theirs == [0, 0, 0, 2]
    moved = {name for name, p in model.named_parameters() if name in frozen and not torch.equal(p, frozen[name])}
    assert not moved and all(p.grad is None for p in below)
    assert not torch.equal(model.eval()(**BATCH).logits, whole(**BATCH).logits)


def test_other_inputs_run_the_layers_themselves():
    model = made()
    whole = copy.deepcopy(model)
    reference = create_reference_model(model, num_shared_layers=2)
    calls = count_calls(reference)
    other = {**BATCH, "input_ids": IDS.flip(1)}
    masked = {**BATCH, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        for asked in (other, masked, BATCH, BATCH):
            model(**BATCH)
            assert torch.allclose(reference(**asked).logits, whole(**asked).logits, atol=1e-6)
        assert calls == [2, 2, 4, 4]
        reference(**BATCH)  # the policy ran them four times: two of these are kept
        reference(**BATCH)
        assert calls == [3, 3, 6, 6]


def in_two_calls(model, prompts=IDS[:, :4], repeats=2):
    """Prompts once for their completions, as policies that share prefixes run them."""
    first = model(input_ids=prompts, use_cache=True)
    first.past_key_values.batch_repeat_interleave(repeats)
    completions = IDS[:, 4:].repeat_interleave(repeats, 0) + 1
    return model(input_ids=completions, past_key_values=first.past_key_values, use_cache=True).logits


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gpt2, with dropout", "neox", "opt"])
def test_prompts_that_are_run_once_are_computed_once(kind):
    """The window of Mistral and Gemma 2 is shorter than the prompt."""
    model = made(kind).train()
    whole = copy.deepcopy(model).eval()
    reference = create_reference_model(model, num_shared_layers=2)
    calls = count_calls(reference)
    for prompts in (IDS[:, :4], IDS[:, 1:5]):
        in_two_calls(model, prompts).sum().backward()
        with torch.no_grad():
            assert torch.allclose(in_two_calls(reference, prompts), in_two_calls(whole, prompts), atol=1e-6)
    assert calls == [0, 0, 4, 4]


def test_the_same_completions_to_other_prompts_are_computed():
    model = made("mistral")
    whole = copy.deepcopy(model)
    reference = create_reference_model(model, num_shared_layers=2)
    calls = count_calls(reference)
    other = IDS[:, :4].clone()
    other[:, 0] += 1  # outside of the window of the completions, in the first layer
    with torch.no_grad():
        in_two_calls(model)
        assert torch.allclose(in_two_calls(reference, other), in_two_calls(whole, other), atol=1e-6)
        assert calls == [2, 2, 2, 2]
        in_two_calls(model)
        model(**BATCH)
        assert torch.allclose(in_two_calls(reference), in_two_calls(whole), atol=1e-6)


def test_saving_the_policy_is_not_disturbed(tmp_path):
    model = made("llama, tied")
    names = set(model.state_dict())
    reference = create_reference_model(model, num_shared_layers=2)
    trained_a_step(model)
    assert set(model.state_dict()) == set(reference.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(**BATCH).logits, model.eval()(**BATCH).logits)
    assert model.lm_head.weight is reference.lm_head.weight is model.model.embed_tokens.weight


def test_a_pattern_names_the_layers():
    model = made("gpt2, with dropout")
    assert shared_layers(create_reference_model(model, 2, pattern="transformer.h.{layer}")) == 2


def test_what_cannot_be_shared_is_said():
    with pytest.raises(UserError, match=r"num_shared_layers is 4; this model has 4 layers at model.layers.* 1 to 3"):
        create_reference_model(made(), num_shared_layers=4)
    with pytest.raises(UserError, match=r"is 0; .* 1 to 3"):
        create_reference_model(made(), num_shared_layers=0)
    with pytest.raises(UserError, match=r"no list of layers at blocks; it has model.layers"):
        create_reference_model(made(), 1, pattern="blocks.{layer}")
    with pytest.raises(UserError, match=r"ending in .\{layer\}"):
        create_reference_model(made(), 1, pattern="blocks")


def test_an_adapter_needs_no_copy():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(UserError, match="needs no copy"):
        create_reference_model(get_peft_model(made(), LoraConfig(target_modules=["q_proj"])))
