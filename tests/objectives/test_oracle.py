"""The losses against values that trl's own trainers gave; tests/oracles/record_trl.py recorded them."""

import json
from pathlib import Path

import pytest
import torch
from oracles.weights import fill
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from shared.objectives.preference import cpo_objective, orpo_objective, pair_objective, pairs_of, wpo_weights
from shared.objectives.reward_modeling import IGNORED, pair_reward_loss, step_loss
from shared.objectives.unpaired import (
    apo_zero_unpaired,
    bco,
    density_ratio,
    desirable_probability,
    fit_logistic,
    kl_estimate,
    kl_sums,
    kto,
    running_mean,
)

FOLDER = Path(__file__).parent.parent / "oracles"
NEW, OLD = (json.loads((FOLDER / f"trl-{version}.json").read_text()) for version in ("1.16.0", "1.12.0"))


def cases(record):
    return [pytest.param(case, id=f"{i}-{case.get('options', '')}") for i, case in enumerate(record["cases"])]


def close(value, expected):
    torch.testing.assert_close(torch.as_tensor(value).float(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def rows(values):
    mask = pad_sequence([torch.ones(len(row)) for row in values], batch_first=True)
    # what stands beside the counted tokens must not matter
    return pad_sequence([torch.tensor(row) for row in values], batch_first=True, padding_value=7.0), mask


def total(losses, pairs):
    return losses.total(pairs=len(pairs.chosen), tokens=pairs.chosen_tokens.sum())


@torch.no_grad()
def test_the_recorded_models_can_be_made_again():
    record = NEW["dpo"]
    ids, attention, mask = (
        torch.tensor(record["batch"][k]) for k in ("input_ids", "attention_mask", "completion_mask")
    )
    for weights, key in (("policy", "logp"), ("reference", "ref_logp")):
        model = fill(LlamaForCausalLM(LlamaConfig(**NEW["model"])), **NEW[weights])
        logp = model(input_ids=ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)
        logp = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
        # trl's rows are all the chosen ones, then all the rejected ones
        first_rejected = len(ids) // 2
        close(logp[first_rejected][mask[first_rejected, 1:].bool()], record[key][1])


@pytest.mark.parametrize("case", cases(NEW["dpo"]))
def test_dpo(case):
    logp, mask = rows(NEW["dpo"]["logp"])
    reference, _ = rows(NEW["dpo"]["ref_logp"])
    options = dict(case["options"])
    ld_alpha = options.pop("ld_alpha", None)
    weights = wpo_weights(logp, rows(NEW["dpo"]["collision"])[0], mask)
    pairs = pairs_of(logp, mask, reference, ld_alpha=ld_alpha, weights=weights)
    objective = pair_objective(
        options.pop("loss_type"),
        options.pop("loss_weights", None),
        f_divergence=options.pop("f_divergence_type", "reverse_kl"),
        f_alpha=options.pop("f_alpha_divergence_coef", 0.5),
        **options,
    )
    close(total(objective(pairs), pairs), case["loss"])


@pytest.mark.parametrize("case", cases(NEW["cpo"]))
def test_cpo(case):
    pairs = pairs_of(*rows(NEW["cpo"]["logp"]))
    losses = cpo_objective(**case["options"])(pairs)
    close(total(losses, pairs), case["loss"])
    close(losses.chosen_rewards.mean(), case["rewards"]["chosen"])
    close(losses.rejected_rewards.mean(), case["rewards"]["rejected"])


@pytest.mark.parametrize("case", cases(NEW["orpo"]))
def test_orpo(case):
    pairs = pairs_of(*rows(NEW["orpo"]["logp"]))
    losses = orpo_objective(**case["options"])(pairs)
    # trl's NLL counts the prompt too, the paper's does not
    close(losses.per_pair.mean(), case["loss"] - case["nll"])
    close(losses.per_token.sum() / pairs.chosen_tokens.sum(), NEW["cpo"]["cases"][0]["nll"])
    close(losses.chosen_rewards.mean(), case["rewards"]["chosen"])


@pytest.mark.parametrize("case", cases(NEW["kto"]))
def test_kto(case):
    record, options = NEW["kto"], dict(case["options"])
    logp, ref, kl_logp, ref_kl = (rows(record[k])[0] * rows(record[k])[1] for k in (
        "logp", "ref_logp", "kl_logp", "ref_kl_logp",
    ))  # fmt: skip
    if case["models"] == "swapped":
        logp, ref, kl_logp, ref_kl = ref, logp, ref_kl, kl_logp
    u, desirable = (logp - ref).sum(1), torch.tensor(record["label"])
    if options.pop("loss_type") == "kto":
        halves = [kl_sums(kl_logp.sum(1)[part], ref_kl.sum(1)[part]) for part in (slice(2), slice(2, None))]
        kl = kl_estimate(halves[0] + halves[1])
        close(kl, case["kl"])
        loss = kto(u, desirable, kl, **options)
    else:
        loss = apo_zero_unpaired(u, desirable, **options)
    close(loss.mean(), case["loss"])


@pytest.mark.parametrize("case", cases(OLD["bco"]))
def test_bco(case):
    record, options = OLD["bco"], case["options"]
    u = torch.tensor([sum(a) - sum(b) for a, b in zip(record["logp"], record["ref_logp"], strict=True)])
    desirable = torch.tensor(record["label"])
    ratio = torch.ones(len(u))
    if "weight" in case:
        sample = [torch.tensor(case["sample"][side]) for side in ("desirable", "undesirable")]
        labels = torch.cat([torch.ones(len(sample[0])), torch.zeros(len(sample[1]))])
        weight, bias = fit_logistic(torch.cat(sample), labels)
        # its solver stops at a gradient of 1e-4
        torch.testing.assert_close(weight.float(), torch.tensor(case["weight"]), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(bias.float(), torch.tensor(case["bias"]), rtol=1e-3, atol=1e-4)
        recorded = torch.tensor(case["weight"]).double(), torch.tensor(case["bias"]).double()
        bounds = {
            key.removesuffix("_density_ratio"): v for key, v in options.items() if key.endswith("_density_ratio")
        }
        bounds = {f"{key}imum": v for key, v in bounds.items()}
        ratio = density_ratio(desirable_probability(torch.tensor(case["features"]), *recorded), **bounds)
    mean, count = torch.zeros(()), torch.zeros(())
    for part, loss, delta in zip(record["batches"], case["losses"], case["deltas"], strict=True):
        rewards = options["beta"] * u[part]
        mean, count = running_mean(mean, count, rewards.sum(), torch.tensor(float(len(part))))
        close(mean, delta)
        own = bco(u[part], desirable[part], mean, beta=options["beta"], density_ratio_P=ratio[part])
        close(own.mean(), loss)


@pytest.mark.parametrize("case", cases(NEW["reward"]))
def test_reward(case):
    scores = torch.tensor(NEW["reward"]["scores"])
    margin = None if case["margin"] is None else torch.tensor(case["margin"])
    loss = pair_reward_loss(scores[0::2], scores[1::2], margin_P=margin, center_coefficient=case["center"] or 0)
    close(loss.mean(), case["loss"])


@pytest.mark.parametrize("case", cases(OLD["prm"]))
def test_steps(case):
    labels = torch.tensor(case["labels"])
    loss = step_loss(torch.tensor(OLD["prm"]["logits"]), labels)
    close(loss.sum() / (labels != IGNORED).sum(), case["loss"])
