"""Options of the trainers that learn from pairs of their own samples, as the command line shows them.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.runtime.options import option
from shared.trainers.online_options import RolloutOptions


@dataclass
class OnlinePreferenceOptions(RolloutOptions):
    """Two samples of each prompt, one of which is preferred."""

    learning_rate: float = option(5e-7, "Peak learning rate of AdamW.")
    num_generations: int = option(
        2, "Samples of each prompt: 2, a pair. per_device_train_batch_size counts samples, so it is even."
    )
    num_generations_eval: int | None = option(1, "Samples of each held-out prompt in an evaluation.")
    pass_reward: float | None = option(
        None, "A sample passes, for pass@k, when its reward reaches this. Unset: no pass@k."
    )
    beta: float | list[float] = option(
        0.1,
        "Strength of the pull towards the reference; of several each is for an epoch, the last for all further ones.",
    )
    judge: str | None = option(
        None,
        "Says which of two samples is better, in place of the sum of the rewards, which are then only measured: a "
        "reward's name, judge:URL|MODEL, or the dotted path of a function f(prompts, pairs) or of a pairwise judge.",
    )
    reward_model_path: str | None = option(None, "Reward model (folder, hub id): the same as reward_funcs with it.")
    missing_eos_penalty: float | None = option(
        None, "Taken off the reward of samples that were cut at their longest, without an end."
    )


@dataclass
class NashMDStepOptions(OnlinePreferenceOptions):
    """Nash-MD."""

    mixture_coef: float | list[float] = option(
        0.5,
        "Share of the reference in the mixture that a sample is compared with one of, 0 (the model itself) to 1 (the "
        "reference alone); of several each is for an epoch.",
    )
    kl_credit: Literal["future", "token"] = option(
        "future",
        "What a token answers for of the divergence from the reference: that of all tokens from it on, without bias, "
        "or its own, with less variance.",
    )


@dataclass
class XPOStepOptions(OnlinePreferenceOptions):
    """XPO."""

    alpha: float | list[float] = option(
        1e-5,
        "α, weight of exploration, which makes the reference's samples less likely; of several each is for an epoch.",
    )
