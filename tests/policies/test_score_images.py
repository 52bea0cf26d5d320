"""Rewards of answers about images: a classifier's own scores and gradients, with images seen once or twice a pair."""

import pytest
import torch
from tiny import FAMILIES
from tiny_pairs import pair_collator, pairs_about
from tiny_pictures import loud, seen_by

from shared.policies.prefix import PrefixSharing
from shared.policies.score import ScorePolicy
from shared.policies.token import whole_rows
from shared.rewards.models import tell_padding
from shared.runtime.models import load_model

WEIGHTS = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0])


def scorer(path, processor, **options):
    torch.manual_seed(0)
    model = loud(load_model(str(path), head="sequence-classification", num_labels=1, **options)).eval()
    tell_padding(model, processor.tokenizer)
    return model


def own(model, batch):
    """The model's own score of each row, without padding."""
    scores = []
    for pair in batch:
        for at in range(2):
            rows = whole_rows(pair.member(at))
            scores.append(
                model(
                    input_ids=rows.completion_ids,
                    attention_mask=rows.completion_attention,
                    use_cache=False,
                    **rows.model_inputs,
                ).logits[0]
            )
    return torch.cat(scores)


@pytest.fixture(params=FAMILIES)
def family(request, tiny):
    return request.param, tiny(request.param)


def test_rewards_and_gradients_are_the_models_own(family, caplog):
    """With shared prompts, with a prompt for each answer, and one answer a prompt."""
    name, path = family
    collate = pair_collator(path)
    rows = pairs_about(name, 3)
    model = scorer(path, collate.collator.processor)
    caplog.clear()
    expected = own(model, [collate([row]) for row in rows])
    (expected * WEIGHTS).sum().backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    scale = max(value.abs().max().item() for value in gradients.values())
    batch = collate(rows)
    for share in (True, False):
        model.zero_grad()
        policy = ScorePolicy(model, share_prefix=share)
        found = policy.rewards(model, batch)
        (found * WEIGHTS).sum().backward()
        assert policy.taught and policy.sharing._possible is share and not caplog.text
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        for key, parameter in model.named_parameters():
            if key in gradients:
                assert (parameter.grad - gradients[key]).abs().max() <= 2e-5 * scale, key
    with torch.no_grad():
        alone = ScorePolicy(model).rewards(model, batch.member(1))
    torch.testing.assert_close(alone, expected[1::2], rtol=1e-4, atol=1e-5)


def test_images_are_seen_once_for_both_answers(tiny):
    collate = pair_collator(tiny("llava"))
    model = scorer(tiny("llava"), collate.collator.processor)
    batch = collate(pairs_about("llava", 3))
    policies = [ScorePolicy(model, share_prefix=share) for share in (True, False)]
    counts = []
    with torch.no_grad():
        for policy in policies:
            policy.rewards(model, batch)  # the first use compares
            with seen_by(model) as seen:
                policy.rewards(model, batch)
            counts.append(sum(seen))
    assert counts[1] == 2 * counts[0] > 0


def test_images_go_in_the_type_of_the_weights(tiny):
    collate = pair_collator(tiny("qwen2_vl"))
    batch = collate(pairs_about("qwen2_vl", 3))
    model = scorer(tiny("qwen2_vl"), collate.collator.processor)
    expected = ScorePolicy(model).rewards(model, batch)
    half = scorer(tiny("qwen2_vl"), collate.collator.processor, dtype="bfloat16")
    for share in (True, False):
        found = ScorePolicy(half, share_prefix=share).rewards(half, batch)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


def test_a_model_that_cannot_share_runs_every_answer_with_its_images(tiny, monkeypatch, caplog):
    collate = pair_collator(tiny("llava"))
    batch = collate(pairs_about("llava", 3))
    model = scorer(tiny("llava"), collate.collator.processor)
    expected = ScorePolicy(model, share_prefix=False).rewards(model, batch)
    monkeypatch.setattr(PrefixSharing, "_disagreement", lambda *_: "it was told so")
    found = ScorePolicy(model).rewards(model, batch)
    torch.testing.assert_close(found, expected)
    assert "it was told so" in caplog.text


def test_a_model_that_alters_its_scores_is_run_by_its_own_forward(tiny, caplog):
    collate = pair_collator(tiny("gemma3"))
    batch = collate(pairs_about("gemma3", 3))
    model = scorer(tiny("gemma3"), collate.collator.processor)
    plain = ScorePolicy(model, share_prefix=False).rewards(model, batch)
    taught = model.forward

    def altered(*args, score_call=None, **kwargs):
        output = taught(*args, score_call=score_call, **kwargs)
        if score_call is None:
            output.logits = 3 * output.logits
        return output

    model.forward = altered
    policy = ScorePolicy(model)
    torch.testing.assert_close(policy.rewards(model, batch), 3 * plain, rtol=1e-4, atol=1e-5)
    assert not policy.taught and "own forward is used" in caplog.text


@pytest.mark.parametrize("pad", [7, None])
def test_rewards_do_not_depend_on_what_fills_the_rows(pad, tiny, caplog):
    collate = pair_collator(tiny("qwen2_vl"))
    batch = collate(pairs_about("qwen2_vl", 3))
    model = scorer(tiny("qwen2_vl"), collate.collator.processor)
    caplog.clear()
    expected = ScorePolicy(model).rewards(model, batch)
    batch.completion_ids[batch.completion_attention == 0] = 9
    model.config.get_text_config().pad_token_id = pad
    torch.testing.assert_close(ScorePolicy(model).rewards(model, batch), expected, rtol=1e-4, atol=1e-5)
    assert not caplog.text
