"""A sampling run: from noise to clean latents, step by step, with or without gradient.

What the denoiser is, how prompts condition it and how latents become pictures is the caller's.

Dimension letters: N rows, T steps, K recorded steps.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as checkpointed

from diffusionalign.schedules import Schedule, rows, wide
from diffusionalign.steps import Sampler, Step, coefficients

Predict = Callable[[Tensor, Tensor], Tensor]
Random = torch.Generator | list[torch.Generator] | None


@dataclass
class Trajectory:
    """What a sampling run made.

    Args:
        final: (N, ...), clean latents, in the type in which latents are kept.
        before, after: (N, K, ...), the latents around each recorded step, in that type.
        at: (N, K) whole numbers, the recorded steps.
        logp: (N, K) float32.
    """

    final: Tensor
    before: Tensor
    after: Tensor
    at: Tensor
    logp: Tensor


def denoise(
    predict: Predict,
    latents: Tensor,
    schedule: Schedule,
    sampler: Sampler,
    *,
    record: Sequence[int] = (),
    window: Container[int] | None = None,
    random: Random = None,
    storage: torch.dtype = torch.float32,
    gradient_from: int | None = None,
    checkpoint: bool = False,
) -> Trajectory:
    """Sample.

    A solver with a memory starts afresh after a stochastic step: the noise has moved the latents off the path along
    which it looks ahead.

    Args:
        predict: gives the denoiser's prediction, (N, ...), for latents, (N, ...), and the step of each row, (N,).
        latents: (N, ...), standard normal noise.
        record: steps that are kept.
        window: steps that are stochastic, out of `sampler.stochastic`; None: all of these. The solver takes the
            others.
        random: of the noise of stochastic steps; a list has one generator for each row, so that its noise depends on
            no other row.
        storage: the type in which latents are kept, and which `predict` is given.
        gradient_from: the first step through which gradient flows; the steps before it, or all for None, have none.
        checkpoint: compute steps again in the backward pass instead of keeping what they computed.
    """
    acts = {step for step in sampler.stochastic(schedule) if window is None or step in window}
    kept: dict[str, list[Tensor]] = {"before": [], "after": [], "logp": []}
    latents, last = latents.to(storage), None
    recorded = sorted(set(record))
    for number in range(schedule.steps):
        gradient = gradient_from is not None and number >= gradient_from
        taken = sampler if number in acts else sampler.deterministic
        noise = normal(latents, random) if number in acts else None
        at = torch.full((len(latents),), number, device=latents.device)
        given = (predict, latents, last, noise, at, schedule, taken, storage)
        with torch.set_grad_enabled(gradient):
            again = checkpoint and gradient
            step, clean = checkpointed(_advance, *given, use_reentrant=False) if again else _advance(*given)
        if number in recorded:
            for name, value in (("before", latents), ("after", step.next), ("logp", step.logp)):
                kept[name].append(value)
        latents, last = step.next, None if number in acts else clean
    before, after = (
        torch.stack(kept[name], 1) if recorded else latents.new_empty((len(latents), 0, *latents.shape[1:]))
        for name in ("before", "after")
    )
    logp = torch.stack(kept["logp"], 1) if recorded else latents.new_empty((len(latents), 0), dtype=torch.float32)
    at = torch.tensor(recorded, dtype=torch.long, device=latents.device).expand(len(latents), -1)
    return Trajectory(latents, before, after, at, logp)


def normal(like: Tensor, random: Random = None) -> Tensor:
    """Standard normal noise in float32 with the shape and on the device of (N, ...), from generators of any device.

    Raises:
        ValueError: a list that has not one generator for each row.
    """
    if isinstance(random, list):
        if len(random) != len(like):
            raise ValueError(f"{len(random)} generators for {len(like)} rows")
        return torch.stack([normal(row, each) for row, each in zip(like, random, strict=True)])
    device = like.device if random is None else random.device
    return torch.randn(like.shape, generator=random, device=device).to(like.device)


def _advance(
    predict: Predict,
    latents: Tensor,
    last: Tensor | None,
    noise: Tensor | None,
    at: Tensor,
    schedule: Schedule,
    sampler: Sampler,
    storage: torch.dtype,
) -> tuple[Step, Tensor | None]:
    """One step, and the x0 that a solver with a memory looks back on, of which `last` is that of the step before."""
    prediction = predict(latents, at)
    if sampler.kind != "dpm":
        return sampler.step(schedule, at, latents, prediction, noise=noise, storage=storage), None
    clean = schedule.clean(latents, at, prediction)
    step = sampler.step(schedule, at, latents, prediction)
    if last is not None:
        change = rows(coefficients(sampler, schedule).change, at)
        step.mean = step.mean + wide(change, clean) * (clean - last)
    return sampler.around(step.mean, step.std, storage=storage), clean
