"""The reference of a preference trainer: the right model's log-probabilities, and a policy left as it was."""

import copy
import types

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from shared.errors import UserError
from shared.policies.base import GroupedBatch
from shared.policies.token import TokenPolicy
from shared.trainers.reference import AdapterOff, Cached, FrozenCopy, NoReference, make_reference
from shared.trainers.reference_sync import SyncReference, load_reference, save_reference, sync_reference

SMALL = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def made(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).train()


def adapted(model=None, **changed):
    torch.manual_seed(1)
    options = {"r": 2, "lora_dropout": 0.5, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(model or made(), LoraConfig(**{**options, **changed})).train()


def pairs():
    prompt = torch.tensor([[0, 0, 3, 4, 3, 4], [5, 6, 7, 8, 9, 10]])
    completion = torch.tensor([[9, 10, 11], [12, 2, 0], [13, 2, 0], [14, 15, 2]])
    attention = (completion != 0).long()
    return GroupedBatch(prompt, (prompt != 0).long(), completion, attention, attention.clone(), group_size=2)


def log_probs(model):
    """The model's own, in evaluation mode, by its plain forward."""
    model = copy.deepcopy(model).eval()
    batch, found = pairs(), torch.zeros(4, 3)
    for row in range(4):
        prompt = batch.prompt_ids[row // 2][batch.prompt_mask[row // 2].bool()]
        completion = batch.completion_ids[row][batch.completion_attention[row].bool()]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        logp = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, completion[:, None]).squeeze(1)
        found[row, : len(completion)] = logp
    return found


def train(model, policy, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(steps):
        (-policy.log_probs(model, pairs()).logp.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


def modes(model):
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


def assert_same(found, expected):
    assert found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def reference_of(model, accelerator, ref_model=None, **options):
    policy = TokenPolicy(model, share_prefix=options.get("share_prefix", True))
    return make_reference(model, ref_model, accelerator=accelerator, policy=policy, **options), policy


def test_a_whole_model_is_held_to_what_it_was_at_the_start(accelerator):
    model = made()
    at_start = log_probs(model)
    reference, policy = reference_of(model, accelerator)
    before = modes(model)
    assert isinstance(reference, FrozenCopy) and modes(model) == before
    train(model, policy)
    assert_same(reference.log_probs(model, pairs()), at_start)
    assert not torch.allclose(log_probs(model), at_start)
    assert accelerator._models == []  # it would be saved with each checkpoint


@pytest.mark.parametrize("share_prefix", [True, False])
def test_shared_layers_give_what_a_whole_copy_gives(accelerator, share_prefix):
    model = made()
    at_start = log_probs(model)
    reference, policy = reference_of(model, accelerator, num_shared_layers=2, share_prefix=share_prefix)
    calls = []
    layers = reference.model.model.layers
    layers[0].mlp.register_forward_hook(lambda *_: calls.append("below"))
    layers[2].mlp.register_forward_hook(lambda *_: calls.append("above"))
    policy.log_probs(model, pairs())
    reference.log_probs(model, pairs())
    calls.clear()
    for _ in range(2):
        train(model, policy, steps=1)
        policy.log_probs(model, pairs())
        assert_same(reference.log_probs(model, pairs()), at_start)
    assert calls == ["above"] * (4 if share_prefix else 2)


def test_a_given_model_or_name_is_the_reference(accelerator, tmp_path):
    other = made(seed=7)
    other.save_pretrained(tmp_path)
    for given in (other, str(tmp_path)):
        reference, _ = reference_of(made(), accelerator, given, load=LlamaForCausalLM.from_pretrained)
        assert isinstance(reference, FrozenCopy) and not reference.model.training
        assert_same(reference.log_probs(made(), pairs()), log_probs(other))


def test_a_new_adapter_is_switched_off(accelerator):
    base = made()
    expected = log_probs(base)
    model = adapted(base)
    reference, policy = reference_of(model, accelerator)
    assert isinstance(reference, AdapterOff) and reference.adapter is None
    assert list(model.peft_config) == ["default"]
    train(model, policy)
    before, trained = modes(model), log_probs(model)
    out = policy.log_probs(model, pairs())  # between a forward pass and its backward pass
    assert_same(reference.log_probs(model, pairs()), expected)
    out.logp.sum().backward()
    assert modes(model) == before
    assert_same(log_probs(model), trained)
    assert not torch.allclose(trained, expected)


def test_an_adapter_that_goes_on_is_held_to_what_it_was(accelerator, tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    train(model, TokenPolicy(model))
    model.save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(made(), tmp_path / "first", is_trainable=True).train()
    at_start = log_probs(model)
    state, before = torch.random.get_rng_state(), {n: p.requires_grad for n, p in model.named_parameters()}
    reference, policy = reference_of(model, accelerator)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert reference.adapter == "reference" and model.active_adapter == "default"
    assert {n: p.requires_grad for n, p in model.named_parameters() if ".reference" not in n} == before
    train(model, policy)
    assert_same(reference.log_probs(model, pairs()), at_start)
    assert not torch.allclose(log_probs(model), at_start)
    held = [p for n, p in model.named_parameters() if ".reference" in n]
    assert held and not any(p.requires_grad or p.grad is not None for p in held)

    model.save_pretrained(tmp_path / "second")
    assert {path.name for path in (tmp_path / "second").iterdir()} >= {"adapter_model.safetensors"}
    assert not (tmp_path / "second" / "reference").exists()
    loaded = PeftModel.from_pretrained(made(), tmp_path / "second")
    assert list(loaded.peft_config) == ["default"]
    assert_same(log_probs(loaded), log_probs(model))


def test_an_adapter_named_reference_is_used(accelerator):
    model = adapted()
    model.add_adapter("reference", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.set_adapter("reference")
    expected = log_probs(model)
    model.set_adapter("default")
    reference, _ = reference_of(model, accelerator)
    assert_same(reference.log_probs(model, pairs()), expected)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".reference" in n)


@pytest.mark.parametrize("options", [{"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [9, 12]}])
def test_new_and_trained_adapters_are_told_apart(accelerator, options):
    model = adapted(**options)
    reference, policy = reference_of(model, accelerator)
    assert reference.adapter is None
    train(model, policy)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    at_start = log_probs(model)
    reference, policy = reference_of(model, accelerator)
    assert reference.adapter == "reference"
    train(model, policy)
    assert_same(reference.log_probs(model, pairs()), at_start)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=16, n_layer=2, n_head=2))


def test_an_adapter_with_weights_beside_it_is_no_reference(accelerator):
    biased = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    with pytest.raises(UserError, match=r"outside of its adapter: .*ln_1\.bias.* and \d+ more.*bias='none'"):
        reference_of(get_peft_model(gpt2(), biased), accelerator)
    model = adapted()
    model.base_model.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(UserError, match="outside of its adapter: base_model.model.model.norm.weight"):
        reference_of(model, accelerator, synced=True)
    assert isinstance(reference_of(model, accelerator, made())[0], FrozenCopy)
    beforehand, _ = reference_of(model, accelerator, beforehand=True)
    assert beforehand.adapter is None  # nothing is changed before training


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_a_learnt_prompt_cannot_be_switched_off(accelerator, config):
    model = get_peft_model(made(), config(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    for options in ({}, {"beforehand": True}):
        with pytest.raises(UserError, match=f"{config.__name__}. learns a prompt"):
            reference_of(model, accelerator, **options)
    assert isinstance(reference_of(model, accelerator, made())[0], FrozenCopy)


def test_before_training_an_adapter_that_goes_on_is_not_copied(accelerator):
    model = adapted()
    train(model, TokenPolicy(model))
    reference, _ = reference_of(model, accelerator, beforehand=True)
    assert reference.adapter == "default" and list(model.peft_config) == ["default"]
    assert_same(reference.log_probs(model, pairs()), log_probs(model))


def test_dropout_does_not_reach_the_reference(accelerator):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.5))
    model = get_peft_model(base, LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)).train()
    reference, _ = reference_of(model, accelerator)
    assert_same(reference.log_probs(model, pairs()), log_probs(model))
    assert model.training


def test_cached_and_none(accelerator):
    batch = pairs()
    batch.columns["ref_logp"] = torch.full((4, 3), -1.5, dtype=torch.float64)
    cached, _ = reference_of(made(), accelerator, precomputed=True)
    assert isinstance(cached, Cached)
    assert_same(cached.log_probs(None, batch), -1.5 * batch.completion_mask.float())
    none, _ = reference_of(made(), accelerator, needed=False)
    assert isinstance(none, NoReference)
    assert_same(none.log_probs(None, batch), torch.zeros(4, 3))


def test_before_training_a_model_is_its_own_reference(accelerator):
    model = made()
    reference, _ = reference_of(model, accelerator, beforehand=True)
    assert isinstance(reference, AdapterOff)
    assert_same(reference.log_probs(model, pairs()), log_probs(model))


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_reference_in_8_bits(accelerator, tmp_path):
    def load(name, quantization_config):
        return LlamaForCausalLM.from_pretrained(
            name, quantization_config=quantization_config, device_map={"": "cpu"}, dtype=torch.float32
        )

    model = made()
    model.save_pretrained(tmp_path)
    for options in ({}, {"name": str(tmp_path)}):
        reference, _ = reference_of(model, accelerator, load=load, load_in_8bit=True, **options)
        held = {p.dtype for p in reference.model.model.layers.parameters()}
        assert torch.int8 in held and model.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
        apart = (reference.log_probs(model, pairs()) - log_probs(model)).abs().max()
        assert 0 < apart < 0.05


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_built_in_reference_in_8_bits_is_that_model(accelerator):
    """And not the policy, though transformers can load and quantise neither by such a name."""
    other = made()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)

    def load(name, quantization_config=None):
        if name.startswith("builtin/"):
            return other
        return LlamaForCausalLM.from_pretrained(
            name, quantization_config=quantization_config, device_map={"": "cpu"}, dtype=torch.float32
        )

    model = made()
    reference, _ = reference_of(model, accelerator, "builtin/lm-small", load=load, load_in_8bit=True)
    held = {p.dtype for p in reference.model.model.layers.parameters()}
    found, away = reference.log_probs(model, pairs()), (log_probs(other) - log_probs(model)).abs().max()
    assert torch.int8 in held and (found - log_probs(other)).abs().max() < away / 4


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_reference_that_follows(accelerator, tmp_path, kind):
    def start():
        model = made() if kind == "whole" else adapted()
        return model, *reference_of(model, accelerator, synced=True)

    model, reference, policy = start()
    at_start = log_probs(model)
    train(model, policy)
    assert_same(reference.log_probs(model, pairs()), at_start)
    trained = {n: p.detach().clone() for n, p in model.named_parameters()}

    sync_reference(model, reference, alpha=0.25)
    own, follower = weights_of(model, reference, kind)
    first = weights_of(*start()[:2], kind)[0]
    for name, now in follower.items():
        torch.testing.assert_close(now, 0.25 * own[name] + 0.75 * first[name], atol=1e-6, rtol=0)
    assert all(torch.equal(p, trained[n]) for n, p in model.named_parameters() if ".reference" not in n)

    save_reference(model, reference, tmp_path, writes=True)
    moved = reference.log_probs(model, pairs())
    other, resumed, _ = start()
    load_reference(other, resumed, tmp_path)
    if kind == "whole":
        assert_same(resumed.log_probs(other, pairs()), moved)
    for name, now in weights_of(other, resumed, kind)[1].items():
        assert torch.equal(now, follower[name]) and not now.requires_grad

    sync_reference(model, reference, alpha=1.0)
    assert_same(reference.log_probs(model, pairs()), log_probs(model))


def weights_of(model, reference, kind):
    if kind == "whole":
        return dict(model.named_parameters()), dict(reference.model.named_parameters())
    named = {n: p for n, p in model.named_parameters() if "lora_" in n}
    own = {n: p for n, p in named.items() if ".default" in n}
    return own, {n.replace(".reference", ".default"): p for n, p in named.items() if ".reference" in n}


def test_the_callback_moves_every_so_many_steps(accelerator):
    model = made()
    reference, policy = reference_of(model, accelerator, synced=True)
    callback = SyncReference(reference, every=2, alpha=1.0)
    train(model, policy)
    at_start = reference.log_probs(model, pairs())
    callback.on_step_end(None, types.SimpleNamespace(global_step=1), None, model=model)
    assert_same(reference.log_probs(model, pairs()), at_start)
    callback.on_step_end(None, types.SimpleNamespace(global_step=2), None, model=model)
    assert_same(reference.log_probs(model, pairs()), log_probs(model))


def test_a_reference_that_stays_is_not_saved(accelerator, tmp_path):
    model = made()
    reference, _ = reference_of(model, accelerator)
    save_reference(model, reference, tmp_path, writes=True)
    load_reference(model, reference, tmp_path)
    assert not list(tmp_path.iterdir())
    synced, _ = reference_of(model, accelerator, synced=True)
    with pytest.raises(UserError, match="holds no reference.safetensors"):
        load_reference(model, synced, tmp_path)


def wider():
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "hidden_size": 32}))


@pytest.mark.parametrize(
    ("given", "ref_model", "options", "words"),
    [
        (made, None, {"synced": True, "precomputed": True}, "exclude each other"),
        (made, wider, {"synced": True}, "same parameters"),
        (made, None, {"synced": True, "load_in_8bit": True}, "cannot be moved"),
        (made, made, {"num_shared_layers": 1}, "excludes a given reference"),
        (made, None, {"num_shared_layers": 1, "beforehand": True}, "exclude each other"),
        (made, None, {"num_shared_layers": 9}, "this model has 3 layers"),
        (adapted, made, {"synced": True}, "does not fit into another model"),
        (adapted, None, {"load_in_8bit": True}, "model without it is the reference"),
        (adapted, None, {"num_shared_layers": 1}, "share layers with"),
    ],
)
def test_what_cannot_go_together_is_said(accelerator, given, ref_model, options, words):
    with pytest.raises(UserError, match=words):
        reference_of(given(), accelerator, ref_model and ref_model(), **options)


def test_the_model_is_not_its_own_reference(accelerator):
    base = made()
    for model in (base, adapted(base)):
        with pytest.raises(UserError, match="ref_model is the model itself, which training changes. Leave it out"):
            reference_of(model, accelerator, base)


@pytest.mark.parametrize(("every", "alpha"), [(0, 0.5), (1, 0.0), (1, 1.5)])
def test_numbers_of_a_move_are_checked(accelerator, every, alpha):
    reference, _ = reference_of(made(), accelerator, synced=True)
    with pytest.raises(UserError, match="ref_model_"):
        SyncReference(reference, every=every, alpha=alpha)
