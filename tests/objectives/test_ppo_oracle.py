"""PPO, distillation, XPO and Nash-MD against values that trl gave; record_trl_ppo.py recorded them."""

import json
from pathlib import Path

import pytest
import torch

from shared.objectives.distillation import jsd
from shared.objectives.kl_control import AdaptiveKL, kl_penalty, skips_batch
from shared.objectives.moments import RunningMoments, moment_sums, whiten
from shared.objectives.online_preference import Answers, nash_md_losses, xpo_losses
from shared.objectives.pair_losses import paired_loss
from shared.objectives.reduce import token_weights
from shared.objectives.value import (
    gae,
    penalise_missing_eos,
    ppo_losses,
    ppo_metrics,
    shaped_scores,
    token_rewards,
    value_losses,
)

FOLDER = Path(__file__).parent.parent / "oracles"
OLD, NEW = (json.loads((FOLDER / f"trl-{version}-ppo.json").read_text()) for version in ("0.11.4", "1.12.0"))
METHODS, STEP, DIVERGENCES, ONLINE = OLD["methods"], OLD["step"], NEW["distillation"], NEW["online"]


def cases(records):
    return [pytest.param(case, id=f"{i}-{case.get('options', '')}") for i, case in enumerate(records)]


def close(value, expected):
    torch.testing.assert_close(torch.as_tensor(value).float(), torch.as_tensor(expected).float(), rtol=1e-5, atol=1e-5)


def tensors(record, mask=None):
    """What stands beside the counted places must not matter."""
    found = {name: torch.tensor(value) for name, value in record.items()}
    if mask is None:
        return found
    beside = ~mask.bool()
    return {
        name: value.masked_fill(beside, float("nan"))
        if value.shape == mask.shape and value.is_floating_point()
        else value
        for name, value in found.items()
    }


def on(mask, values):
    return torch.as_tensor(values)[mask.bool()]


def clips(options):
    return {
        "epsilon": options["cliprange"],
        "value_epsilon": options["cliprange_value"],
        "vf_coef": options["vf_coef"],
    }


MASK = torch.tensor(METHODS["mask"])
FIXED = tensors(OLD["tensors"], MASK)


@pytest.mark.parametrize("case", cases(METHODS["rewards"]))
def test_rewards_of_tokens(case):
    kind = case["options"]["kl_penalty"]
    names = ("full_logp", "full_ref") if kind == "full" else ("logp", "ref")
    penalty = kl_penalty(*(FIXED[name] for name in names), kind=kind)
    close(on(MASK, penalty), on(MASK, case["kl"]))
    found = token_rewards(FIXED["scores"], penalty, MASK, coefficient=OLD["options"]["init_kl_coef"])
    close(on(MASK, found), on(MASK, case["rewards"]))


@pytest.mark.parametrize("case", cases(METHODS["advantages"]))
def test_advantages_and_returns(case):
    mask = torch.ones_like(MASK) if case["whole"] else MASK
    given = tensors(OLD["tensors"], mask)
    options = {**OLD["options"], **case["options"]}
    rewards = whiten(given["rewards"], mask, shift_mean=False) if options["whiten_rewards"] else given["rewards"]
    advantages, returns = gae(rewards, given["values"], mask, gamma=options["gamma"], lam=options["lam"])
    close(on(mask, returns), on(mask, case["returns"]))
    close(on(mask, whiten(advantages, mask)), on(mask, case["advantages"]))


@pytest.mark.parametrize("case", cases(METHODS["losses"]))
def test_losses_and_their_gradients(case):
    options, stats = {**OLD["options"], **case["options"]}, case["stats"]
    names = ("logp", "old", "advantages", "vpreds", "values", "returns")
    logp, old, advantages, values, old_values, returns = (FIXED[name].clone() for name in names)
    weights = token_weights(MASK, mode="token")
    losses = ppo_losses(
        logp.requires_grad_(), old, advantages, values.requires_grad_(), old_values, returns, MASK, **clips(options)
    )
    mean_ratio = (weights * (logp - old).masked_fill(MASK == 0, 0).exp()).sum().item()
    skipped = skips_batch(mean_ratio, options.get("ratio_threshold", 10.0))
    assert skipped == (stats["loss/total"] == 0)
    loss = (weights * losses).sum() * (not skipped)
    close(loss, stats["loss/total"])
    for found, expected in zip(torch.autograd.grad(loss, (logp, values)), case["gradients"], strict=True):
        close(found, expected)
    value = value_losses(values, old_values, returns, MASK, epsilon=options["cliprange_value"])
    close((weights * value).sum() * (not skipped), stats["loss/value"])
    found = ppo_metrics(logp, old, values, old_values, returns, MASK, value_epsilon=options["cliprange_value"])
    for own, theirs in (
        ("policy_kl", "policy/policykl"), ("approx_kl", "policy/approxkl"), ("value/error", "val/error"),
        ("value/clip_ratio", "val/clipfrac"),
    ):  # fmt: skip
        close(found[own][0] / found[own][1], stats[theirs])


def test_the_adaptive_coefficient():
    record = OLD["controllers"]
    control = AdaptiveKL(0.2, target=6, horizon=1000)
    for (kl, rows), expected in zip(record["kl_steps"], record["coefficients"], strict=True):
        control.step(kl, rows)
        assert control.coefficient == pytest.approx(expected)


def test_running_moments():
    moments = RunningMoments()
    for batch, (mean, std) in zip(OLD["controllers"]["scores"], OLD["controllers"]["moments"], strict=True):
        moments.update(moment_sums(torch.tensor(batch)))
        assert (moments.mean, moments.std) == pytest.approx((mean, std), rel=1e-5)


def test_two_calls_of_step():
    """From the scores and log-probabilities of the rollout to the losses of each epoch and the next coefficient."""
    options = STEP["options"]
    control = AdaptiveKL(options["init_kl_coef"], target=options["target"], horizon=options["horizon"])
    for record in STEP["steps"]:
        (rollout,), (estimates,) = record["compute_rewards"], record["compute_advantages"]
        mask = torch.tensor(rollout["mask"])
        assert mask.sum(1).tolist() == [len(row) for row in STEP["responses"]]
        scores = shaped_scores(torch.tensor(record["given"]), clip=options["score_clip"])
        given = tensors(rollout | estimates, mask)
        penalty = kl_penalty(given["logp"], given["ref"])
        rewards = token_rewards(scores, penalty, mask, coefficient=control.coefficient)
        close(on(mask, rewards), on(mask, rollout["rewards"]))
        advantages, returns = gae(rewards, given["values"], mask, gamma=options["gamma"], lam=options["lam"])
        close(on(mask, returns), on(mask, estimates["returns"]))
        advantages = whiten(advantages, mask)
        close(on(mask, advantages), on(mask, estimates["advantages"]))
        for epoch in record["loss"]:
            # an epoch has the rows in an order of its own
            order = [rollout["logp"].index(row) for row in epoch["old"]]
            update = tensors(epoch, mask[order])
            losses = ppo_losses(
                update["logp"], update["old"], advantages[order], update["vpreds"], given["values"][order],
                returns[order], mask[order], **clips(options),
            )  # fmt: skip
            loss = (token_weights(mask[order], mode="token") * losses).sum()
            close(loss, epoch["policy"] + epoch["value"])
        kl = penalty.masked_fill(mask == 0, 0).sum(1).mean().item()
        assert kl == pytest.approx(record["stats"]["objective/kl"], rel=1e-4)
        assert record["stats"]["objective/kl_coef"] == pytest.approx(control.coefficient)
        control.step(kl, len(mask))
        assert control.coefficient == pytest.approx(record["coefficient"], rel=1e-5)


@pytest.mark.parametrize("case", cases(NEW["ppo"]))
def test_the_later_trainer(case):
    options, given = case["options"], tensors(case["rollout"])
    actions, states = ~given["padding_mask"], ~given["padding_mask_p1"]  # trl has a value after the last action too
    kind = "kl" if options["kl_estimator"] == "k1" else "k3"
    penalty = kl_penalty(given["logprobs"], given["ref_logprobs"], kind=kind)
    rewards = token_rewards(given["scores"], penalty, states, coefficient=options["kl_coef"])
    close(on(states, rewards), on(states, given["rewards"]))
    advantages, returns = gae(rewards, given["values"], states, gamma=options["gamma"], lam=options["lam"])
    close(on(states, advantages), on(states, given["raw_advantages"]))
    close(on(states, returns), on(states, given["returns"]))
    advantages = whiten(advantages, actions)
    close(on(actions, advantages), on(actions, given["advantages"]))

    assert len(case["updates"]) == 3
    for record in case["updates"]:
        update, rows = tensors(record), record["micro_batch_inds"]
        inputs = [update[name] for name in ("new_logprobs", "mb_logprobs", "mb_advantage")]
        values = [update[name] for name in ("vpred", "mb_values", "mb_return")]
        # no value loss in the first, no policy in the second: their means have different denominators
        policy = ppo_losses(*inputs, *values, actions[rows], **{**clips(options), "vf_coef": 0.0})
        close((token_weights(actions[rows], mode="token") * policy).sum(), record["pg_loss"])
        value = value_losses(*values, states[rows], epsilon=options["cliprange_value"])
        value = (token_weights(states[rows], mode="token") * value).sum()
        close(value, record["vf_loss"])


@pytest.mark.parametrize("case", cases(NEW["ppo"]))
def test_the_penalty_for_a_missing_end(case):
    given, raw = tensors(case["rollout"]), torch.tensor(case["raw_scores"])
    ended = given["contain_eos_token"]
    assert 0 < ended.sum() < len(ended)
    close(penalise_missing_eos(raw, ended, case["options"]["missing_eos_penalty"]), given["scores"])


@pytest.mark.parametrize("case", cases(DIVERGENCES["cases"]))
@pytest.mark.parametrize("chunk_size", [3, None])
def test_divergences_of_distillation(case, chunk_size):
    counted = torch.tensor(DIVERGENCES["labels"]) != -100
    student = torch.tensor(DIVERGENCES["student"]).requires_grad_()
    losses = jsd(
        student[counted], torch.tensor(DIVERGENCES["teacher"])[counted], beta=case["beta"],
        temperature=case["temperature"], chunk_size=chunk_size,
    )  # fmt: skip
    loss = losses.sum() / counted.sum()
    close(loss, case["loss"])
    close(torch.autograd.grad(loss, student)[0], case["gradient"])


def test_xpo():
    record = ONLINE["xpo"]
    own, other, own_ref, other_ref = (torch.tensor(ONLINE[n]) for n in ("own", "other", "own_ref", "other_ref"))
    inputs = [own.requires_grad_(), other.requires_grad_()]
    rows = [
        Answers(x.sum(1), ref.sum(1), torch.full((3,), 4)) for x, ref in zip(inputs, (own_ref, other_ref), strict=True)
    ]
    loss = paired_loss("sigmoid", beta=record["beta"])
    losses = xpo_losses(*rows, torch.tensor(record["wins"]), loss, alpha=record["alpha"])
    close(losses, record["losses"])
    for found, expected in zip(torch.autograd.grad(losses.mean(), inputs), record["gradients"], strict=True):
        close(found, expected)


def test_nash_md():
    record, own = ONLINE["nash_md"], torch.tensor(ONLINE["own"]).requires_grad_()
    loss = nash_md_losses(
        own, torch.tensor(ONLINE["own_ref"]), torch.ones_like(own), torch.tensor(record["probability"]),
        beta=record["beta"], credit="token",
    ).mean()  # fmt: skip
    close(loss, record["loss"])
    close(torch.autograd.grad(loss, own)[0], record["gradient"])
