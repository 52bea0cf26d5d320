"""Presets of the policy-gradient trainers by name: a paper's numbers, below what the user gives; and mixes that fail.

Imports no torch, so that `--help` can list them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from shared.errors import UserError

# name -> options
RECIPES: dict[str, dict[str, Any]] = {
    # Shao et al. 2024, arXiv:2402.03300
    "grpo": {
        "loss_type": "grpo",
        "beta": 0.04,
        "kl_estimator": "k3",
        "use_bias_correction_kl": False,
        "epsilon": 0.2,
        "scale_rewards": "group",
    },
    # Zheng et al. 2025, arXiv:2507.18071: the ratio of a sample moves far less than that of a token
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
        "beta": 0.0,
    },
    # Liu et al. 2025, arXiv:2503.20783
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "epsilon": 0.2},
    # Yu et al. 2025, arXiv:2503.14476; its soft punishment is the reward get_soft_overlong_punishment
    "dapo": {
        "loss_type": "dapo",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "dynamic_sampling": True,
        "mask_truncated_completions": True,
        "beta": 0.0,
        "scale_rewards": "group",
    },
    # MiniMax-M1, arXiv:2506.13585; the bound of ScaleRL, arXiv:2510.13786
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.0},
    # arXiv:2511.20347
    "sapo": {"loss_type": "sapo", "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "beta": 0.0},
    # arXiv:2602.05261
    "luspo": {
        "loss_type": "luspo",
        "importance_sampling_level": "sequence",
        "epsilon": 2e-3,
        "epsilon_high": 2.5e-3,
        "beta": 0.0,
    },
    # arXiv:2602.10693
    "vespo": {"loss_type": "vespo", "beta": 0.0},
    # arXiv:2601.05242
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "group"},
    # Wang et al. 2025, arXiv:2506.01939: over DAPO
    "high_entropy": {
        "loss_type": "dapo",
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "dynamic_sampling": True,
        "top_entropy_quantile": 0.2,
        "beta": 0.0,
    },
    # INTELLECT-2, arXiv:2505.07291
    "two_sided": {"loss_type": "grpo", "delta": 4.0, "epsilon": 0.2},
}


def with_recipe(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with those of the recipe they name below them.

    Raises:
        UserError: there is no such recipe.
    """
    name = given.get("recipe")
    if name is None:
        return dict(given)
    if name not in RECIPES:
        close = difflib.get_close_matches(str(name), RECIPES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise UserError(f"recipe {name!r} is not known.{hint} There are: {', '.join(RECIPES)}.")
    return {**RECIPES[name], **given}


def doubtful(args: Any, rewards: int) -> list[str]:
    """What is known to go wrong with these options, a sentence each.

    Args:
        args: PolicyGradientOptions.
        rewards: how many rewards there are.
    """
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    scaled = args.scale_rewards not in ("none", False)
    updates = args.num_iterations * args.steps_per_generation > args.gradient_accumulation_steps
    found = {
        f"importance_sampling_level sequence with epsilon {args.epsilon:g}: the ratio of a sample hardly leaves 1, so "
        "that nothing is ever clipped. GSPO has 3e-4 (--recipe gspo).": args.importance_sampling_level == "sequence"
        and args.loss_type in ("grpo", "bnpo", "dapo", "dr_grpo", "luspo")
        and args.epsilon > 0.05
        and updates,
        f"importance_sampling_level token with epsilon {args.epsilon:g}: nearly every token is clipped; so small "
        "bounds are GSPO's, of whole samples.": args.importance_sampling_level == "token" and args.epsilon < 0.01,
        "dr_grpo divides neither by lengths nor by deviations: scale_rewards none goes with it.": (
            args.loss_type == "dr_grpo" and scaled
        ),
        f"cispo with epsilon_high {high:g}: that is the ratio's bound itself, not its distance from 1; below 1 it "
        "cuts every sample. The paper's is 5 (--recipe cispo).": (
            args.loss_type == "cispo" and args.epsilon_high is not None and high < 1
        ),
        f"luspo adds up a sample's tokens, which goes with importance_sampling_level sequence, not "
        f"{args.importance_sampling_level}.": args.loss_type == "luspo"
        and args.importance_sampling_level != "sequence",
        "multi_objective_aggregation normalize_then_sum has one reward: it changes nothing but the scale.": (
            args.multi_objective_aggregation == "normalize_then_sum" and rewards < 2
        ),
        f"epsilon_high {high:g} is below epsilon {args.epsilon:g}: chances fall faster than they rise, which takes "
        "entropy away.": args.loss_type not in ("cispo", "sapo", "vespo") and high < args.epsilon,
        f"beta {args.beta:g} with kl_estimator k1 and no use_bias_correction_kl: its gradient is zero on average, so "
        "it holds nothing.": bool(args.beta) and args.kl_estimator == "k1" and not args.use_bias_correction_kl,
        f"temperature {args.temperature:g}: a group's samples will hardly differ.": args.temperature < 0.3,
        f"num_generations {args.num_generations}: a mean of so few rewards is a noisy baseline.": (
            args.num_generations < 4 and scaled
        ),
    }
    return [text for text, applies in found.items() if applies]
