"""The noise levels of one sampling run, in one form for all pipelines: x_i = α_i x0 + σ_i ε.

Level 0 is where sampling starts, level T the clean end; step i goes from level i to level i + 1. Stable Diffusion's
schedules keep α² + σ² = 1, flow matching has α = 1 - σ; what a denoiser gives (noise, velocity, clean picture) is
turned into both x0 and ε by two numbers a level. How a step is taken is in `steps`.

Schedulers of diffusers are read here and nowhere else: their levels and what the denoiser is told, not their steps.

Dimension letters: N rows, T steps.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared.errors import UserError

# read as DDIM with the same betas: what they differ in is the way a step is taken
BY_BETAS = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "DDIMParallelScheduler",
    "DDPMParallelScheduler",
)  # fmt: skip
FLOW = "FlowMatchEulerDiscreteScheduler"
FLOW_BY_OPTION = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # with use_flow_sigmas
PREDICTIONS = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True, eq=False)
class Schedule:
    """Noise levels of a sampling run.

    Args:
        prediction: what the denoiser gives: "epsilon", the noise; "v_prediction", α ε - σ x0; "sample", x0; "flow",
            ε - x0.
        timesteps: (T,); what the denoiser is told at step i.
        alphas, sigmas: (T + 1,) float32.
    """

    prediction: str
    timesteps: Tensor
    alphas: Tensor
    sigmas: Tensor

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> Schedule:
        moved = {name: getattr(self, name).to(device) for name in ("timesteps", "alphas", "sigmas")}
        return replace(self, **moved)

    def clean(self, latents: Tensor, at: Tensor, prediction: Tensor) -> Tensor:
        """The clean latents x0 that a prediction stands for.

        Args:
            latents, prediction: (N, ...), any floating type.
            at: (N,), the level of each row, below T.

        Returns:
            (N, ...) float32.
        """
        known = estimates(self)
        return combined(latents, rows(known.clean_latents, at), prediction, rows(known.clean_prediction, at))

    def noise(self, latents: Tensor, at: Tensor, prediction: Tensor) -> Tensor:
        """The noise ε that a prediction stands for; as `clean`."""
        known = estimates(self)
        return combined(latents, rows(known.noise_latents, at), prediction, rows(known.noise_prediction, at))

    def noised(self, clean: Tensor, at: Tensor, noise: Tensor) -> Tensor:
        """Clean latents with noise added to level `at` of each row, 0 to T; (N, ...) float32."""
        return combined(clean, rows(self.alphas, at), noise, rows(self.sigmas, at))


class Estimates(NamedTuple):
    """x0 = clean_latents x + clean_prediction p, ε = noise_latents x + noise_prediction p; (T,) float64 each."""

    clean_latents: Tensor
    clean_prediction: Tensor
    noise_latents: Tensor
    noise_prediction: Tensor


@lru_cache(maxsize=64)
def estimates(schedule: Schedule) -> Estimates:
    """How x0 and ε follow from latents x and prediction p at each level."""
    # sampling may run in inference mode, whose tensors training could not use later
    with torch.inference_mode(False):
        alpha, sigma = (level[:-1].cpu().double() for level in (schedule.alphas, schedule.sigmas))
        one, none = torch.ones_like(alpha), torch.zeros_like(alpha)
        match schedule.prediction:
            case "epsilon":
                found = (1 / alpha, -sigma / alpha, none, one)
            case "v_prediction":
                found = (alpha, -sigma, sigma, alpha)
            case "sample":
                found = (none, one, 1 / sigma, -alpha / sigma)
            case "flow":
                found = (one, -sigma, one, alpha)
            case other:
                raise ValueError(f"prediction {other!r}: one of {', '.join((*PREDICTIONS, 'flow'))}")
        return Estimates(*(each.to(schedule.alphas.device) for each in found))


def rows(table: Tensor, at: Tensor) -> Tensor:
    """The entries of a table for each row, (N,) float32."""
    return table[at].float()


def wide(values: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, ...), to go with rows of latents."""
    return values.view(-1, *[1] * (like.dim() - 1))


def combined(first: Tensor, weight: Tensor, second: Tensor, other: Tensor) -> Tensor:
    """The weighted sum of two batches, (N, ...) float32, with a weight for each row, (N,)."""
    return wide(weight, first) * first.float() + wide(other, second) * second.float()


# ---- Read from diffusers --------------------------------------------------------------------------------------------


def check_scheduler(scheduler: Any) -> None:
    """See that a scheduler's levels can be read.

    Raises:
        UserError: it cannot be; names those that can.
    """
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    if _is_flow(scheduler):
        if config.get("invert_sigmas"):
            raise UserError(f"the pipeline's {name} has invert_sigmas=True, which is not supported: set it to False.")
        return
    if name not in BY_BETAS:
        raise UserError(
            f"the pipeline's scheduler, {name}, is not supported. Give the pipeline one of these: "
            f"{', '.join((*BY_BETAS, FLOW))}."
        )
    if (prediction := config.get("prediction_type", "epsilon")) not in PREDICTIONS:
        raise UserError(
            f"the pipeline's {name} has prediction_type={prediction!r}, which is not supported without "
            f"use_flow_sigmas=True: one of {', '.join(PREDICTIONS)}."
        )
    for option in ("thresholding", "clip_sample"):
        # what other schedulers take by default says nothing of latents; DDIM alone is read as it stands
        if config.get(option) and name.startswith("DDIM"):
            raise UserError(
                f"the pipeline's {name} has {option}=True, which is for pictures, not for latents: set it to False, "
                f"e.g. pipeline.scheduler = {name}.from_config(pipeline.scheduler.config, {option}=False)."
            )


def schedule_of(
    scheduler: Any,
    num_steps: int,
    *,
    device: torch.device | str = "cpu",
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
) -> Schedule:
    """The noise levels of `num_steps` steps by a pipeline's scheduler, which is left as it is.

    Between two steps is one level, that at which the second starts. Schedulers with spacings that do not divide their
    training steps evenly ("linspace", or "trailing" with 30 of 1000) round the two differently by up to one step.

    Args:
        scheduler: of diffusers, one that `check_scheduler` takes.
        num_steps: T.
        mu: shift of flow levels by the picture's size, for a scheduler with use_dynamic_shifting.
        sigmas: (T,), flow levels before they are shifted, for pipelines that give their own (Flux).

    Raises:
        UserError: a scheduler or a number of steps that cannot work.
    """
    check_scheduler(scheduler)
    trained = scheduler.config.get("num_train_timesteps", 1000)
    if not 1 <= num_steps <= trained:
        raise UserError(f"num_inference_steps={num_steps}: must be between 1 and the scheduler's {trained}.")
    with torch.inference_mode(False):
        return (_flow if _is_flow(scheduler) else _by_betas)(scheduler, num_steps, mu, sigmas).to(device)


def _is_flow(scheduler: Any) -> bool:
    name = type(scheduler).__name__
    return name == FLOW or (name in FLOW_BY_OPTION and bool(scheduler.config.get("use_flow_sigmas")))


def _flow(scheduler: Any, steps: int, mu: float | None, sigmas: Sequence[float] | None) -> Schedule:
    own = copy.deepcopy(scheduler)
    if own.config.get("use_dynamic_shifting") and mu is None:
        raise UserError(
            f"the pipeline's {type(own).__name__} has use_dynamic_shifting=True: its levels depend on mu, a shift for "
            "the size of the picture. Give mu, or set use_dynamic_shifting to False."
        )
    given: dict[str, Any] = {"mu": mu} if own.config.get("use_dynamic_shifting") else {}
    if sigmas is not None:
        given["sigmas"] = list(sigmas)
    own.set_timesteps(steps, **given)
    levels = own.sigmas.float().cpu()
    if len(levels) != steps + 1:
        raise UserError(f"the pipeline's {type(own).__name__} makes {len(levels) - 1} levels of {steps} steps.")
    return Schedule("flow", own.timesteps.float().cpu(), 1 - levels, levels)


def _by_betas(scheduler: Any, steps: int, mu: float | None, sigmas: Sequence[float] | None) -> Schedule:
    from diffusers import DDIMScheduler

    own = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    own.set_timesteps(steps)
    if own.timesteps.max() >= len(own.alphas_cumprod):
        raise UserError(
            f"num_inference_steps={steps} with steps_offset={own.config.steps_offset} goes beyond the scheduler's "
            f"{len(own.alphas_cumprod)} training steps: give fewer steps."
        )
    squared = torch.cat([own.alphas_cumprod[own.timesteps], own.final_alpha_cumprod.view(1)]).double()
    prediction = own.config.prediction_type
    if prediction == "epsilon" and squared[0] == 0:
        raise UserError(
            "a scheduler with rescale_betas_zero_snr=True starts from noise alone, from which no picture follows by "
            'prediction_type="epsilon": set rescale_betas_zero_snr to False, or timestep_spacing to "leading".'
        )
    return Schedule(prediction, own.timesteps.cpu(), squared.sqrt().float(), (1 - squared).sqrt().float())


def training_schedule(scheduler: Any) -> Schedule:
    """Every level that a pipeline's denoiser is trained at, from the noisiest on: what clean pictures are noised to.

    Flow levels are shifted as the scheduler's configuration says; a shift by the picture's size is of sampling alone.

    Args:
        scheduler: of diffusers, one that `check_scheduler` takes.

    Raises:
        UserError: a scheduler that cannot work.
    """
    check_scheduler(scheduler)
    config = scheduler.config
    with torch.inference_mode(False):
        if _is_flow(scheduler):
            trained = config.get("num_train_timesteps", 1000)
            levels = torch.arange(trained, -1, -1, dtype=torch.float64) / trained
            if not config.get("use_dynamic_shifting"):
                shift = config.get("shift", config.get("flow_shift", 1.0))
                levels = shift * levels / (1 + (shift - 1) * levels)
            return Schedule("flow", (levels[:-1] * trained).float(), (1 - levels).float(), levels.float())
        from diffusers import DDIMScheduler

        own = DDIMScheduler.from_config(config, clip_sample=False)
        squared = torch.cat([own.alphas_cumprod.flip(0), torch.ones(1)]).double()
        steps = torch.arange(len(squared) - 2, -1, -1)
        return Schedule(own.config.prediction_type, steps, squared.sqrt().float(), (1 - squared).sqrt().float())
