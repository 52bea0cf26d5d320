"""The score policy gives a classifier's own scores and gradients, with the prompt run once or with every row."""

import pytest
import torch
from tiny_text import _config
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForSequenceClassification,
)

from shared.policies.base import GroupedBatch
from shared.policies.score import ScorePolicy, tokens_to_last

FAMILIES = (
    "qwen2",
    "qwen3",
    "llama",
    "mistral",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "phi",
    "falcon",
    "bloom",
)


def scorer(family, auto=AutoModelForSequenceClassification, labels=1):
    config = _config(family)
    config.num_labels, config.pad_token_id = labels, 0
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


@pytest.fixture
def batch():
    """Two pairs on prompts of 9 and 6 tokens, their answers of 4, 2, 3 and 1 tokens."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 300, (2, 9), generator=draw)
    answers = torch.randint(3, 300, (4, 4), generator=draw)
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    attention = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
    return GroupedBatch(prompts * mask, mask, answers * attention, attention, attention, group_size=2)


def rows_alone(batch):
    """Each row without padding, prompt and answer joined."""
    for at in range(batch.rows):
        prompt, answer = at // batch.group_size, batch.completion_attention[at].bool()
        yield torch.cat([batch.prompt_ids[prompt][batch.prompt_mask[prompt].bool()], batch.completion_ids[at][answer]])


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_and_gradients_are_the_models_own(family, share, batch, caplog):
    model = scorer(family)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = torch.cat([model(row[None]).logits[0] for row in rows_alone(batch)])
    (expected * weights).sum().backward()
    own = gradients(model)
    model.zero_grad()

    policy = ScorePolicy(model, share_prefix=share)
    found = policy.rewards(model, batch)
    (found * weights).sum().backward()

    assert policy.taught and policy.sharing.applies(model, batch, None) is share and not caplog.text
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(model).items():
        scale = own[name].abs().max().clamp(min=1)
        torch.testing.assert_close(gradient / scale, own[name] / scale, rtol=1e-4, atol=2e-5)


def test_the_score_is_read_at_the_last_token_that_is_no_padding():
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 0, 0], [5, 0, 6, 0], [0, 0, 0, 0]])
    attention = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    assert tokens_to_last(ids, attention, 0).tolist() == [3, 2, 3, 0]
    assert tokens_to_last(ids, attention, None).tolist() == [3, 2, 4, 2]


@pytest.mark.parametrize("pad", [0, 7, None])
def test_rewards_do_not_depend_on_what_fills_the_rows(pad, batch):
    model = scorer("llama")
    expected = ScorePolicy(model).rewards(model, batch)
    batch.completion_ids[batch.completion_attention == 0] = 9 if pad is None else pad
    batch.prompt_ids[batch.prompt_mask == 0] = 9
    model.config.pad_token_id = pad
    torch.testing.assert_close(ScorePolicy(model).rewards(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_a_batch_of_saved_rows_scores_as_in_plain_transformers(batch):
    model = scorer("qwen2")
    rows = list(rows_alone(batch))
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row, row.new_zeros(width - len(row))]) for row in rows])
    plain = model(input_ids=ids, attention_mask=(ids != 0).long()).logits[:, 0]
    torch.testing.assert_close(ScorePolicy(model).rewards(model, batch), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_class_scores_are_those_of_the_counted_tokens(family):
    model = scorer(family, AutoModelForTokenClassification, labels=2)
    ids = torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(0))
    attention = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    mask = torch.tensor([[0, 0, 1, 0, 0, 0, 1], [0, 1, 0, 0, 1, 0, 0]])
    logits = model(input_ids=ids, attention_mask=attention).logits
    expected = torch.stack([logits[0, 2], logits[0, 6], logits[1, 1], logits[1, 4]])
    policy = ScorePolicy(model)
    found = policy.class_scores(model, GroupedBatch.of_rows(ids, attention=attention, mask=mask))
    assert policy.taught
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_token_classifiers_keep_the_dropout_before_their_head():
    model = scorer("llama", AutoModelForTokenClassification, labels=2).train()
    model.dropout.p = 1.0
    ids = torch.tensor([[5, 6, 7]])
    ones = torch.ones_like(ids)
    found = ScorePolicy(model).class_scores(model, GroupedBatch.of_rows(ids, attention=ones, mask=ones))
    torch.testing.assert_close(found, model.score.bias.expand(3, 2))


def test_a_model_that_pools_is_run_by_its_own_forward(batch, caplog):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**small, vocab_size=300, num_labels=1, pad_token_id=0)).eval()
    policy = ScorePolicy(model)
    expected = torch.cat([model(row[None]).logits[0] for row in rows_alone(batch)])
    torch.testing.assert_close(policy.rewards(model, batch), expected, rtol=1e-5, atol=1e-5)
    assert not policy.taught and not caplog.text


def test_a_model_that_alters_its_scores_is_run_by_its_own_forward(batch, caplog):
    model = scorer("llama")
    policy = ScorePolicy(model)
    taught = model.forward

    def altered(*args, score_call=None, **kwargs):
        output = taught(*args, score_call=score_call, **kwargs)
        if score_call is None:
            output.logits = 3 * output.logits
        return output

    model.forward = altered
    expected = torch.cat([model(row[None]).logits[0] for row in rows_alone(batch)])
    torch.testing.assert_close(policy.rewards(model, batch), expected, rtol=1e-5, atol=1e-5)
    assert not policy.taught and "own forward is used" in caplog.text


def test_the_head_runs_outside_of_autocast(batch):
    model = scorer("llama")
    policy = ScorePolicy(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = policy.rewards(model, batch)
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())


def test_plain_calls_go_on_as_before_and_a_copy_runs_on_its_own_weights(batch):
    import copy

    model = scorer("llama")
    row = next(rows_alone(batch))[None]
    before = model(row).logits
    ScorePolicy(model)
    policy = ScorePolicy(model)  # a second one on the same model
    assert torch.equal(model(row).logits, before)
    twin = copy.deepcopy(model)
    expected = policy.rewards(model, batch)
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(ScorePolicy(twin).rewards(twin, batch), expected)


def test_a_head_that_an_adapter_trains_gets_the_gradient(batch):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(scorer("llama"), LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    policy = ScorePolicy(model)
    policy.rewards(model, batch).sum().backward()
    head = model.get_base_model().score
    assert policy.taught and head.modules_to_save["default"].weight.grad.abs().sum() > 0
    assert head.original_module.weight.grad is None
