"""Policy-gradient losses and advantages against values that trl gave; record_trl_online.py recorded them."""

import json
from pathlib import Path

import pytest
import torch
from oracles.weights import fill
from transformers import LlamaConfig, LlamaForCausalLM

from shared.objectives.advantages import (
    gdpo_advantages,
    group_advantages,
    leave_one_out,
    top_entropy,
    weighted_rewards,
)
from shared.objectives.policy_gradient import PolicyGradient
from shared.policies.base import GroupedBatch
from shared.policies.token import TokenPolicy

RECORD = json.loads((Path(__file__).parent.parent / "oracles" / "trl-1.16.0-online.json").read_text())
LOSSES = RECORD["losses"]
MASK = torch.tensor(LOSSES["batch"]["completion_mask"])
ADVANTAGES = torch.tensor(LOSSES["advantages"])
REWARDS = torch.tensor([[float("nan") if r is None else r for r in row] for row in RECORD["rewards"]])
LONGEST = 20  # trl's max_completion_length


def cases(records):
    return [pytest.param(case, id=f"{i}-{case['options']}") for i, case in enumerate(records)]


def close(value, expected):
    torch.testing.assert_close(torch.as_tensor(value).float(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def grid(name):
    # what stands beside the counted tokens must not matter
    return torch.full(MASK.shape, 7.0).masked_scatter(MASK.bool(), torch.tensor(LOSSES[name]))


def test_the_policy_gives_the_recorded_log_probabilities():
    batch = LOSSES["batch"]
    prompts = [torch.tensor(batch[name])[::3] for name in ("prompt_ids", "prompt_mask")]
    completions = torch.tensor(batch["completion_ids"])
    grouped = GroupedBatch(*prompts, completions, MASK, MASK, group_size=3)
    model = fill(LlamaForCausalLM(LlamaConfig(**RECORD["model"])), **RECORD["policy"])
    found = TokenPolicy(model).log_probs(model, grouped, entropy=True)
    close(found.logp[MASK.bool()], LOSSES["logp"])
    close(found.entropy[MASK.bool()], LOSSES["entropy"])


def objective_of(options):
    options = dict(options)
    level = options.pop("importance_sampling_level", "token")
    corrected = options.pop("use_bias_correction_kl", True)
    longest = LONGEST if options["loss_type"] == "dr_grpo" else None
    return PolicyGradient(importance=level, bias_corrected_kl=corrected, max_actions=longest, **options)


@pytest.mark.parametrize("case", cases(LOSSES["cases"]))
def test_losses_and_their_gradients(case):
    options = dict(case["options"])
    share, coefficient = options.pop("top_entropy_quantile", 1.0), options.pop("entropy_coef", 0.0)
    objective = objective_of(options)
    logp, ref = grid("logp").requires_grad_(), grid("ref")
    old = grid("old") if case["old"] else None
    advantages = ADVANTAGES[:, None] * top_entropy(grid("entropy"), MASK, share)

    weights = objective.weights(MASK, rows=len(MASK), actions=MASK.sum())
    losses = objective.row_losses(logp, old, advantages, MASK, ref=ref)
    loss = (weights * losses).sum() - coefficient * grid("entropy")[MASK.bool()].mean()

    close(loss, case["loss"])
    (gradient,) = torch.autograd.grad(loss, logp)
    close(gradient[MASK.bool()], case["gradient"])
    found = {name: (total / count).item() for name, (total, count) in
             objective.metrics(logp, old, ADVANTAGES, MASK, ref).items()}  # fmt: skip
    assert {name: found[name] for name in case["metrics"]} == pytest.approx(case["metrics"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("case", cases(LOSSES["rloo"]))
def test_leave_one_out_losses_and_their_gradients(case):
    objective = PolicyGradient(importance="sequence_sum", **case["options"])
    logp = grid("logp").requires_grad_()
    weights = objective.weights(MASK, rows=len(MASK), actions=MASK.sum())
    loss = (weights * objective.row_losses(logp, grid("old"), ADVANTAGES, MASK)).sum()
    close(loss, case["loss"])
    close(torch.autograd.grad(loss, logp)[0][MASK.bool()], case["gradient"])


@pytest.mark.parametrize("case", cases(RECORD["grpo_advantages"]))
def test_group_relative_advantages(case):
    weights = torch.tensor(RECORD["reward_weights"])
    if "multi_objective_aggregation" in case["options"]:
        found = gdpo_advantages(REWARDS, weights, 4)
    else:
        found = group_advantages(weighted_rewards(REWARDS, weights), 4, scale=case["options"]["scale_rewards"])
    close(found, case["advantages"])


@pytest.mark.parametrize("case", cases(RECORD["rloo_advantages"]))
def test_leave_one_out_advantages(case):
    rewards = weighted_rewards(REWARDS, torch.tensor(RECORD["reward_weights"]))
    close(leave_one_out(rewards, 4, normalize=case["options"]["normalize_advantages"]), case["advantages"])
