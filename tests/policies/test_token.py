"""The token policy gives a model's own log-probabilities and gradients, however the batch is laid out."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from shared.objectives.supervised import nll
from shared.policies.base import GroupedBatch
from shared.policies.token import TokenPolicy, whole_rows

SMALL = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MODELS = {
    "plain": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "soft-capping": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.05)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=5.0)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=0.1)),
    "biased": lambda: PhiForCausalLM(PhiConfig(**SMALL)),
    "other names": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=64)),
}


@pytest.fixture
def batch():
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(0))
    attention = torch.ones_like(ids)
    attention[1, 6:] = 0
    mask = attention.clone()
    mask[0, :4] = mask[2, 3:5] = 0  # row 1 counts its first token too, which nothing predicts
    return GroupedBatch.of_rows(ids, attention=attention, mask=mask)


def model_of(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    if kind == "biased":
        torch.nn.init.normal_(model.lm_head.bias)
    return model


def own_loss(model, batch):
    labels = batch.completion_ids.masked_fill(batch.completion_mask == 0, -100)
    return model(input_ids=batch.completion_ids, attention_mask=batch.completion_attention, labels=labels).loss


@pytest.mark.parametrize("kind", MODELS)
def test_loss_and_gradients_equal_the_models_own(kind, batch):
    model = model_of(kind)
    expected = own_loss(model, batch)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    policy = TokenPolicy(model)
    count = batch.completion_mask[:, 1:].sum()
    loss, stats = policy.action_objective(model, batch, lambda logp, at: nll(logp) / count, entropy=True)
    loss.backward()

    assert policy.fused
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)
    assert stats.logp.shape == (count,) and (stats.entropy > 0).all()


@pytest.mark.parametrize("kind", MODELS)
def test_log_probs_stand_where_their_tokens_stand(kind, batch):
    model = model_of(kind)
    logits = model(input_ids=batch.completion_ids, attention_mask=batch.completion_attention).logits
    expected = logits[:, :-1].log_softmax(-1).gather(2, batch.completion_ids[:, 1:, None]).squeeze(2)
    counted = batch.completion_mask[:, 1:]

    found = TokenPolicy(model).log_probs(model, batch)

    torch.testing.assert_close(found.logp[:, 1:], expected * counted, rtol=1e-4, atol=1e-5)
    assert (found.logp[:, 0] == 0).all() and (found.mask[:, 0] == 0).all()
    assert torch.equal(found.mask[:, 1:], counted.float())


def test_log_probs_carry_a_gradient(batch):
    model = model_of("plain")
    count = batch.completion_mask[:, 1:].sum()
    policy = TokenPolicy(model)
    (-policy.log_probs(model, batch).logp.sum() / count).backward()
    found = model.lm_head.weight.grad.clone()
    model.zero_grad()
    own_loss(model, batch).backward()
    torch.testing.assert_close(found, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


def test_prompts_are_joined_to_their_completions():
    batch = GroupedBatch(
        prompt_ids=torch.tensor([[0, 0, 7, 8], [9, 10, 11, 12]]),
        prompt_mask=torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
        completion_ids=torch.tensor([[21, 22, 23], [24, 0, 0], [25, 26, 0], [27, 28, 29]]),
        completion_attention=torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1]]),
        completion_mask=torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 1, 1]]),
        group_size=2,
    )
    rows = whole_rows(batch)
    assert rows.completion_ids[0, :5].tolist() == [7, 8, 21, 22, 23]
    assert rows.completion_ids[3].tolist() == [9, 10, 11, 12, 27, 28, 29]
    assert rows.completion_mask[2].tolist() == [0, 0, 0, 0, 1, 1, 0]

    model = model_of("plain")
    found = TokenPolicy(model).log_probs(model, batch)
    alone = model(input_ids=torch.tensor([[7, 8, 21, 22, 23]])).logits.log_softmax(-1)
    expected = torch.stack([alone[0, 1, 21], alone[0, 2, 22], alone[0, 3, 23]])
    torch.testing.assert_close(found.logp[0], expected, rtol=1e-4, atol=1e-5)
    assert found.logp[1, 1:].tolist() == [0, 0] and found.logp[3, 0] == 0


def test_a_model_that_hides_what_it_does_to_its_logits_is_run_whole(batch, caplog):
    model = model_of("plain")
    forward = model.forward

    def altered(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 3.0
        return output

    model.forward = altered
    policy = TokenPolicy(model)
    # `altered` stands between the policy and what it reads from the configuration
    model.forward = (lambda inner: lambda *a, head_call=None, **k: inner(*a, head_call=head_call, **k))(model.forward)
    count = batch.completion_mask[:, 1:].sum()
    loss, _ = policy.action_objective(model, batch, lambda logp, at: nll(logp) / count)
    logits = altered(input_ids=batch.completion_ids, attention_mask=batch.completion_attention).logits[:, :-1]
    labels = batch.completion_ids[:, 1:].masked_fill(batch.completion_mask[:, 1:] == 0, -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected)
    assert not policy.fused and "whole logits" in caplog.text
    found = policy.log_probs(model, batch, entropy=True, collision=True)
    every = logits.log_softmax(-1)
    counted = batch.completion_mask[:, 1:]
    torch.testing.assert_close(found.entropy[:, 1:], -(every.exp() * every).sum(-1) * counted)
    torch.testing.assert_close(found.collision[:, 1:], every.exp().square().sum(-1).log() * counted)


def grouped():
    """Two prompts with two completions each."""
    ids = torch.randint(3, 61, (4, 5), generator=torch.Generator().manual_seed(1))
    attention = torch.arange(5) < torch.tensor([5, 3, 4, 5])[:, None]
    return GroupedBatch(
        prompt_ids=torch.tensor([[0, 7, 8, 9, 10, 11], [9, 10, 11, 12, 13, 14]]),
        prompt_mask=torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
        completion_ids=ids * attention,
        completion_attention=attention.long(),
        completion_mask=attention.long(),
        group_size=2,
    )


@pytest.mark.parametrize("kind", ["plain", "tied", "soft-capping", "biased", "run whole"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("via", ["objective", "log_probs"])
def test_an_entropy_bonus_reaches_the_model(kind, shared, via):
    model = model_of("plain" if kind == "run whole" else kind)
    batch = grouped()
    rows = whole_rows(batch)
    policy = TokenPolicy(model, temperature=0.7, share_prefix=shared)
    policy.fused = policy.fused and kind != "run whole"
    factors = torch.linspace(-1, 2, int(batch.counted_tokens()))

    logits = model(input_ids=rows.completion_ids, attention_mask=rows.completion_attention).logits[:, :-1]
    every = (logits[rows.completion_mask[:, 1:].bool()] / 0.7).log_softmax(-1)
    own = every.gather(1, rows.completion_ids[:, 1:][rows.completion_mask[:, 1:].bool()][:, None]).squeeze(1)
    expected = -own.sum() + (factors * -(every.exp() * every).sum(-1)).sum()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    if via == "objective":
        loss, stats = policy.action_objective(model, batch, lambda logp, at: -logp, entropy_weights=factors)
        assert stats.entropy.shape == factors.shape and not stats.entropy.requires_grad
    else:
        found = policy.log_probs(model, batch, entropy_gradient=True)
        loss = -found.logp.sum() + (factors * found.entropy[found.mask.bool()]).sum()
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


def test_a_batch_that_counts_nothing_gives_zero(batch):
    batch.completion_mask = torch.zeros_like(batch.completion_mask)
    model = model_of("plain")
    loss, stats = TokenPolicy(model).action_objective(model, batch, lambda logp, at: nll(logp))
    loss.backward()
    assert loss == 0 and stats.logp.numel() == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_generation_and_plain_calls_go_on_as_before(batch):
    model = model_of("plain")
    prompt = batch.completion_ids[:1, :4]
    before = model.generate(prompt, max_new_tokens=5, do_sample=False), own_loss(model, batch)
    TokenPolicy(model)
    TokenPolicy(model)  # a second policy on the same model
    after = model.generate(prompt, max_new_tokens=5, do_sample=False), own_loss(model, batch)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


def test_a_copy_runs_on_its_own_weights(batch):
    import copy

    model = model_of("plain")
    TokenPolicy(model)
    twin = copy.deepcopy(model)
    expected = TokenPolicy(model).log_probs(model, batch).logp
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(TokenPolicy(twin).log_probs(twin, batch).logp, expected)
    assert own_loss(twin, batch) != own_loss(model, batch)


def test_a_head_that_an_adapter_trains_is_trained_and_switched_off(batch):
    from peft import LoraConfig, get_peft_model

    model = model_of("plain")
    TokenPolicy(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    policy = TokenPolicy(adapted)
    loss, _ = policy.action_objective(adapted, batch, lambda logp, at: nll(logp))
    loss.backward()
    copies = adapted.get_base_model().lm_head.modules_to_save
    assert policy.fused and copies["default"].weight.grad.abs().sum() > 0
    copies["default"].weight.data.zero_()
    with adapted.disable_adapter():
        off = policy.log_probs(adapted, batch).logp
    assert not torch.allclose(off, policy.log_probs(adapted, batch).logp)


def test_more_tokens_bring_a_head_that_is_taught_too(batch):
    model = model_of("plain")
    policy = TokenPolicy(model)
    model.resize_token_embeddings(70)
    loss, _ = policy.action_objective(model, batch, lambda logp, at: nll(logp))
    assert policy.fused and loss.isfinite()


def test_a_router_loss_is_refused():
    from shared.errors import UserError

    model = model_of("plain")
    model.config.output_router_logits = True
    with pytest.raises(UserError, match="output_router_logits"):
        TokenPolicy(model)
