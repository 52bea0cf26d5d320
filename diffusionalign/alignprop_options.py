"""Options of AlignProp, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusionalign.options import DiffusionOptions
from shared.runtime.options import option
from shared.trainers.online_options import RolloutOptions


@dataclass
class AlignPropOptions(DiffusionOptions, RolloutOptions):
    """Back-propagation of a differentiable reward through the denoising steps."""

    learning_rate: float = option(1e-3, "Peak learning rate of AdamW.")
    num_generations: int = option(1, "Images of each prompt in a round, each from noise of its own.")
    sampler: Literal["ddim", "sde", "cps", "ode", "dpm"] | None = option(
        "ode",
        "How a denoising step is drawn: ode and dpm without noise, as pipelines mostly do; ddim with noise by eta; "
        "sde (Flow-GRPO, flow matching alone) and cps (Flow-CPS) with noise by noise_level.",
    )
    backprop_strategy: Literal["gaussian", "uniform", "fixed", "full", "draft_lv", "refl"] = option(
        "gaussian",
        "From which step the gradient flows: gaussian and uniform draw it once a round (AlignProp), fixed is "
        "DRaFT-K, full all steps; draft_lv: the last step, from several noises; refl: one late step, from which the "
        "image is predicted at once.",
    )
    truncated_backprop_timestep: int | None = option(
        None,
        "fixed: the first step with a gradient, counted from 0; num_inference_steps - K is DRaFT-K. gaussian: the "
        "mean of the step that is drawn. Unset: the last step; gaussian: 42 of 50.",
    )
    truncated_backprop_std: float | None = option(
        None, "gaussian: standard deviation of the step that is drawn. Unset: 5 of 50."
    )
    truncated_rand_backprop_minmax: list[int] | None = option(
        None,
        "uniform and refl: first and last step that may be drawn, counted from 0. Unset: any; refl: the last quarter.",
    )
    draft_lv_noises: int = option(2, "draft_lv: how often an image is noised again to the last level.")
    reward_threshold: float | None = option(
        None, "Learn from images whose reward is below this alone: the loss is ReLU(threshold - reward), as ReFL's."
    )
    beta: float = option(
        0.0,
        "Weight of the mean squared difference between the denoiser's predictions with and without its adapter, on "
        "the images noised to a random level: holds the model near to its start.",
    )
    checkpoint_steps: bool = option(
        False,
        "Compute whole denoising steps again in the backward pass: memory for one step, whatever their number. "
        "activation_checkpointing does so for the layers of denoiser and VAE.",
    )
