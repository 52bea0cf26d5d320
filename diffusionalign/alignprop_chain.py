"""Images that keep the gradient of the steps that made them: how far back it goes, and two ways round most steps.

AlignProp: Prabhudesai et al. 2023, arXiv:2310.03739. DRaFT: Clark et al. 2023, arXiv:2309.17400. ReFL: Xu et al. 2023,
arXiv:2304.05977. Deliberately not here: what the images are worth, and the loss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffusionalign.sampling import Random, denoise, normal
from diffusionalign.schedules import Schedule
from diffusionalign.steps import Sampler
from shared.errors import UserError

MEAN, STD = 42 / 50, 5 / 50  # of the first step with a gradient, as a share of the steps: AlignProp's
LATE = 30 / 40  # from where ReFL draws its step


@dataclass(frozen=True)
class Truncation:
    """From which step of the chain the gradient flows.

    Args:
        steps: T.
        low, high: the first step with a gradient lies between them, both included.
        mean, std: it is drawn from this normal distribution; None: uniformly.
    """

    steps: int
    low: int
    high: int
    mean: float | None = None
    std: float = 0.0

    @classmethod
    def of(cls, args: Any) -> Truncation:
        """What AlignPropOptions ask for.

        Raises:
            UserError: steps that the chain does not have.
        """
        steps, at, limits = (
            args.num_inference_steps,
            args.truncated_backprop_timestep,
            args.truncated_rand_backprop_minmax,
        )
        if at is not None and not 0 <= at < steps:
            raise UserError(f"truncated_backprop_timestep {at}: must be a step of the chain, 0 to {steps - 1}.")
        if limits is not None and (len(limits) != 2 or not 0 <= limits[0] <= limits[1] < steps):
            raise UserError(
                f"truncated_rand_backprop_minmax {' '.join(map(str, limits))}: must be two steps of the chain, 0 to "
                f"{steps - 1}, the lower one first."
            )
        last = steps - 1
        if args.backprop_strategy == "gaussian":
            std = STD * steps if args.truncated_backprop_std is None else args.truncated_backprop_std
            return cls(steps, 0, last, MEAN * steps if at is None else at, std)
        if args.backprop_strategy in ("uniform", "refl"):
            usual = (int(LATE * steps), last) if args.backprop_strategy == "refl" else (0, last)
            return cls(steps, *(usual if limits is None else limits))
        first = {"full": 0, "draft_lv": last, "fixed": last if at is None else at}[args.backprop_strategy]
        return cls(steps, first, first)

    def draw(self, random: torch.Generator) -> int:
        """The first step with a gradient, of one round."""
        if self.mean is None:
            return int(torch.randint(self.low, self.high + 1, (), generator=random))
        drawn = round(self.mean + self.std * float(torch.randn((), generator=random)))
        return min(max(drawn, self.low), self.high)


@dataclass(frozen=True)
class Chain:
    """The sampling chain of a pipeline, run with a gradient. Latents are `(N, C, h, w)`.

    Args:
        adapter: of the pipeline.
        schedule, sampler: the steps.
        guidance_scale: of classifier-free guidance.
        checkpoint: compute steps again in the backward pass instead of keeping what they computed.
    """

    adapter: Any
    schedule: Schedule
    sampler: Sampler
    guidance_scale: float = 1.0
    checkpoint: bool = False

    def truncated(self, model: nn.Module, latents: Tensor, first: int, random: Random, **conditioning: Any) -> Tensor:
        """Clean latents, from noise; the gradient flows from step `first` on.

        Args:
            model: the denoiser.
            latents: standard normal noise.
            random: of the noise of the steps; see denoise.
            conditioning: `positive`, what the prompts became, and `negative`.
        """
        return self._run(model, latents, self.schedule, first, random, conditioning)

    def low_variance(
        self, model: nn.Module, latents: Tensor, noises: int, random: Random, **conditioning: Any
    ) -> Tensor:
        """DRaFT-LV: `((1 + noises) * N, C, h, w)`, gradient through the last step alone.

        The images, and behind them what the last step makes of them once they are noised again to its level.
        """
        last = self.schedule.steps - 1
        found = [self.truncated(model, latents, last, random, **conditioning)]
        clean = found[0].detach()
        at = torch.full((len(clean),), last, device=clean.device)
        for _ in range(noises):
            again = self.schedule.noised(clean, at, normal(clean, random))
            found.append(self._run(model, again, self._part(last, last + 1), 0, random, conditioning))
        return torch.cat(found)

    def one_step(self, model: nn.Module, latents: Tensor, step: int, random: Random, **conditioning: Any) -> Tensor:
        """ReFL: what step `step` predicts of the clean latents; the steps before it have no gradient."""
        if step > 0:
            latents = self._run(model, latents, self._part(0, step), None, random, conditioning)
        at = torch.full((len(latents),), step, device=latents.device)
        return self.schedule.clean(latents, at, self._predict(model, latents, self.schedule, at, conditioning))

    def _part(self, start: int, stop: int) -> Schedule:
        """The schedule of the steps from `start` to before `stop`."""
        whole, levels = self.schedule, slice(start, stop + 1)
        return replace(
            whole, timesteps=whole.timesteps[start:stop], alphas=whole.alphas[levels], sigmas=whole.sigmas[levels]
        )

    def _run(
        self,
        model: nn.Module,
        latents: Tensor,
        schedule: Schedule,
        first: int | None,
        random: Random,
        conditioning: dict[str, Any],
    ) -> Tensor:
        return denoise(
            lambda latents, at: self._predict(model, latents, schedule, at, conditioning),
            latents,
            schedule,
            self.sampler,
            random=random,
            gradient_from=first,
            checkpoint=self.checkpoint,
        ).final

    def _predict(
        self, model: nn.Module, latents: Tensor, schedule: Schedule, at: Tensor, conditioning: dict[str, Any]
    ) -> Tensor:
        return self.adapter.predict(
            model,
            latents,
            schedule.timesteps[at],
            conditioning["positive"],
            negative=conditioning.get("negative"),
            guidance_scale=self.guidance_scale,
        )
