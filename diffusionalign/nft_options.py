"""Options of DiffusionNFT, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusionalign.options import RewardedOptions
from shared.runtime.options import option


@dataclass
class DiffusionNFTOptions(RewardedOptions):
    """Learning from rewarded pictures by the forward process."""

    learning_rate: float = option(3e-4, "Peak learning rate of AdamW.")
    beta: float = option(
        1e-4,
        "λ, weight of the squared distance to the prediction of the model without its adapter, or of a frozen copy "
        "where the whole model is trained; 0 runs no reference.",
    )
    nft_beta: float = option(
        1.0, "β, how far the model is moved towards good pictures and away from bad ones; smaller is faster."
    )
    advantage_clip: float = option(
        5.0, "A_max: an advantage of as much makes a picture wholly a good one, of minus as much wholly a bad one."
    )
    noise_levels: int | None = option(
        None, "Levels of noise at which each picture is learnt from, spread evenly over the steps. Unset: all steps."
    )
    old_decay_rate: float = option(
        0.001,
        "Growth with each optimizer step of the share that the sampling model keeps of itself from round to round.",
    )
    old_decay_max: float = option(0.5, "Greatest such share; 0: the model as it is samples.")
    old_decay_start: int = option(0, "Steps before which that share is 0.")

    num_inference_steps: int = option(10, "T, denoising steps of a picture in training.")
    guidance_scale: float = option(1.0, "Of Flux, what it is told. Others are sampled from and trained without.")
    sampler: Literal["ddim", "sde", "cps", "ode", "dpm"] | None = option(
        "dpm",
        "How pictures are drawn: any way will do. dpm, DPM-Solver++(2M), and ode without noise; ddim with noise by "
        "eta, sde and cps by noise_level.",
    )
    eval_num_inference_steps: int | None = option(40, "Denoising steps in evaluations; none: num_inference_steps.")
    eval_sampler: Literal["same", "ode", "dpm"] = option(
        "ode", "How evaluations draw: as training does, or without noise, as pipelines mostly do."
    )
    num_iterations: int = option(1, "How many times a round's pictures are trained on, each time with other noise.")
