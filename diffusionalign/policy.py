"""DenoisingPolicy: log-probabilities of recorded denoising steps, pairs of a picture and a step folded into one batch.

Each pair is a row of its own to the denoiser, so that how many are run at once changes speed and memory alone. The
transition is computed by the code that sampled, on latents as they were kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from diffusionalign.pipelines.base import PipelineAdapter
from diffusionalign.schedules import Schedule
from diffusionalign.steps import Sampler, Step, kl
from shared.policies.base import LogProbs


@dataclass
class DenoisingBatch:
    """R pictures with K recorded steps each; or N pairs of a picture and a step, as N rows with one step.

    Args:
        before, after: `(R, K, C, h, w)`, the latents around each step, in the type in which they are kept.
        at: `(R, K)`, the steps.
        prompts: R.
        negatives: R, None for no negative prompt.
        action_mask: `(R, K)`, 1 where the objective counts the step.
        columns: what the objective needs, by name, `(R,)` or `(R, K)`.
        reference: `(R, K, C, h, w)` float32, the means of the steps under the reference.
    """

    before: Tensor
    after: Tensor
    at: Tensor
    prompts: list[str]
    negatives: list[str | None]
    action_mask: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    reference: Tensor | None = None

    def to(self, device: torch.device | str) -> Self:
        """The batch on another device."""
        tensors = ("before", "after", "at", "action_mask")
        moved = {name: getattr(self, name).to(device) for name in tensors}
        return replace(self, **moved, columns={name: value.to(device) for name, value in self.columns.items()})

    def parts(self, pairs: int) -> Iterator[Self]:
        """Its R * K pairs, picture by picture, so many at a time."""
        rows, count = self.at.shape
        for start in range(0, rows * count, pairs):
            own = range(start, min(start + pairs, rows * count))
            flat = slice(own.start, own.stop)
            yield replace(
                self,
                **{name: getattr(self, name).flatten(0, 1)[flat, None] for name in ("before", "after")},
                at=self.at.flatten()[flat, None],
                prompts=[self.prompts[pair // count] for pair in own],
                negatives=[self.negatives[pair // count] for pair in own],
                action_mask=self.action_mask.flatten()[flat, None],
                columns={name: _of_pairs(value, count)[flat] for name, value in self.columns.items()},
                reference=None if self.reference is None else self.reference.flatten(0, 1)[flat, None],
            )


def _of_pairs(value: Tensor, count: int) -> Tensor:
    """`(R * K,)` of `(R,)`, `(R * K, 1)` of `(R, K)`."""
    return value.repeat_interleave(count) if value.ndim == 1 else value.reshape(-1, 1)


@dataclass
class StepStats:
    """Detached statistics of the N counted steps of a batch; see shared.policies.base.ActionStats.

    Args:
        logp: `(N,)`.
        kl: `(N,)`, the divergence from the reference, where there is one.
    """

    logp: Tensor
    kl: Tensor | None = None
    entropy: None = None


class DenoisingPolicy:
    """How a denoiser gives log-probabilities of steps: as it did when it sampled.

    Args:
        adapter: the pipeline.
        schedule, sampler: of sampling.
        guidance_scale: of sampling.
        pairs_at_once: pairs that `log_probs` runs at a time.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        schedule: Schedule,
        sampler: Sampler,
        *,
        guidance_scale: float,
        pairs_at_once: int,
    ):
        self.adapter, self.schedule, self.sampler = adapter, schedule, sampler
        self.guidance_scale, self.pairs_at_once = guidance_scale, pairs_at_once

    def around(self, model: nn.Module, *, share_prefix: bool = True) -> Self:
        """Itself: it keeps nothing of a model."""
        return self

    def steps(self, model: nn.Module, batch: DenoisingBatch) -> Step:
        """The steps of a batch's pairs, R * K rows, by the model as it is."""
        count = batch.at.shape[1]
        at, latents = batch.at.flatten(), batch.before.flatten(0, 1)
        adapter, scale = self.adapter, self.guidance_scale
        positive = adapter.encode_prompts([prompt for prompt in batch.prompts for _ in range(count)])
        negative = None
        if adapter.guided and scale > 1:
            negative = adapter.encode_prompts([prompt for prompt in batch.negatives for _ in range(count)])
        timesteps = self.schedule.timesteps[at]
        prediction = adapter.predict(model, latents, timesteps, positive, negative=negative, guidance_scale=scale)
        after = batch.after.flatten(0, 1)
        return self.sampler.step(self.schedule, at, latents, prediction, next=after, storage=after.dtype)

    def log_probs(
        self, model: nn.Module, batch: DenoisingBatch, *, entropy: bool = False, entropy_gradient: bool = False
    ) -> LogProbs:
        """Log-probabilities `(R, K)` of the batch's steps, mean over a latent's numbers.

        Args:
            model: the denoiser as the engine wraps it.
            batch: the steps.
            entropy, entropy_gradient: not given: the noise of a step is the schedule's own.
        """
        found = torch.cat([self.steps(model, part).logp for part in batch.parts(self.pairs_at_once)])
        return LogProbs(found.view(batch.at.shape) * batch.action_mask, batch.action_mask)

    def action_objective(
        self,
        model: nn.Module,
        batch: DenoisingBatch,
        objective: Callable[[Tensor, slice], Tensor],
        *,
        reference: Tensor | None = None,
        kl_weights: Tensor | None = None,
        entropy: bool = False,
        entropy_weights: Tensor | None = None,
    ) -> tuple[Tensor, StepStats]:
        """Sum of an objective that is separable by step; all pairs at once.

        Args:
            model: the denoiser as the engine wraps it.
            batch: the steps, of which N are counted.
            objective: gets `(N,)` log-probabilities, and which they are; gives `(N,)` weighted losses.
            reference: `(R * K, C, h, w)`, the means of the steps under the reference; adds their divergence.
            kl_weights: `(R * K,)`, what the divergence of each step is multiplied by.
            entropy, entropy_weights: see log_probs.
        """
        step = self.steps(model, batch)
        mask = batch.action_mask.flatten().bool()
        logp = step.logp[mask]
        loss = objective(logp, slice(0, len(logp))).sum()
        divergence = None
        if reference is not None:
            divergence = kl(step, reference)
            loss = loss + (divergence * kl_weights)[mask].sum()
            divergence = divergence.detach()[mask]
        return loss, StepStats(logp.detach(), divergence)
