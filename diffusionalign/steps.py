"""One denoising step, for all samplers: the next latents, their log-probability, mean and standard deviation.

Whatever the sampler, the mean of step i is α' x0 + m ε with the x0 and ε that the prediction stands for, α' and σ' the
next level, and the step adds noise of standard deviation s (`noises`):

    ddim    s = η (σ'/σ) √(σ² - (α σ'/α')²)              m = √(σ'² - s²)
    cps     s = σ' sin(a π/2)                            m = √(σ'² - s²)
    sde     s = a √(t / (1 - t)) √(t - t'),  t = σ       m = σ' - s² / 2t        (flow matching alone)
    ode     s = 0                                        m = σ'
    dpm     as ode, but with x0 carried on: a second-order solver

so that it is linear in latents and prediction: two numbers a level, made once in double precision. A step whose s is
below `FLOOR`, or that ends without noise, has no density worth the name: it is taken as a step of the solver, and is
no action.

Latents are rounded to the type in which they are kept before anything is said of them, and all is computed in
float32: the log-probability of kept latents is what it was when they were drawn, bit for bit.

Dimension letters: N rows, T steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffusionalign.schedules import Schedule, combined, estimates, rows, wide
from shared.errors import UserError

Kind = Literal["ddim", "sde", "cps", "ode", "dpm"]
Solver = Literal["ode", "dpm"]

# of latents of about unit variance: half precision rounds them by up to .004
FLOOR = 0.01
STRETCH = 2.0
NOISE_LEVELS = {"sde": 0.7, "cps": 0.8}


@dataclass
class Step:
    """A step of N rows.

    Args:
        next: (N, ...), rounded to the type in which latents are kept.
        logp: (N,) float32, mean over a row's elements; 0 where the step is no action.
        mean: (N, ...) float32.
        std: (N,) float32; 0 where the step is no action.
    """

    next: Tensor
    logp: Tensor
    mean: Tensor
    std: Tensor


class Coefficients(NamedTuple):
    """mean = latents x + prediction p + change (x0 - x0 of the step before); (T,) float64 each."""

    latents: Tensor
    prediction: Tensor
    change: Tensor
    std: Tensor


@dataclass(frozen=True)
class Sampler:
    """A stochastic step, and the solver that takes the other steps.

    Args:
        kind: "ddim" (Song et al. 2021, arXiv:2010.02502); "sde" (Flow-GRPO, arXiv:2505.05470); "cps" (Flow-CPS,
            arXiv:2509.05952); deterministic: "ode", DDIM with η = 0 and the Euler step of flow matching; "dpm",
            DPM-Solver++(2M), arXiv:2211.01095.
        eta: η of "ddim", 0 to 1.
        noise_level: a of "sde" (.7 if not given) and "cps" (.8; at most 1).
        solver: of the steps that are not stochastic, "ode" or "dpm".

    Raises:
        UserError: an unknown name or an option out of its range.
    """

    kind: Kind = "ddim"
    eta: float = 1.0
    noise_level: float | None = None
    solver: Solver = "ode"

    def __post_init__(self) -> None:
        for name, choices in (("kind", get_args(Kind)), ("solver", get_args(Solver))):
            if (value := getattr(self, name)) not in choices:
                label = "sampler" if name == "kind" else name
                raise UserError(f"{label}={value!r}: must be one of {', '.join(choices)}.")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta={self.eta}: must be between 0 (no noise) and 1 (as much as in DDPM).")
        if self.noise_level is not None and not 0 <= self.noise_level <= (1 if self.kind == "cps" else math.inf):
            raise UserError(f"noise_level={self.noise_level}: must be at least 0, and at most 1 for sampler='cps'.")

    @property
    def deterministic(self) -> Sampler:
        """The sampler that takes the steps without noise."""
        return self if self.kind in get_args(Solver) else Sampler(self.solver)

    def stochastic(self, schedule: Schedule) -> list[int]:
        """The steps that are actions, in order.

        Raises:
            UserError: a sampler that does not go with the schedule.
        """
        return coefficients(self, schedule).std.nonzero().flatten().tolist()

    def step(
        self,
        schedule: Schedule,
        at: Tensor,
        latents: Tensor,
        prediction: Tensor,
        *,
        next: Tensor | None = None,
        noise: Tensor | None = None,
        storage: torch.dtype = torch.float32,
    ) -> Step:
        """Take a step, or say how probable one was.

        Args:
            at: (N,) whole numbers, the step of each row.
            latents: (N, ...), before the step.
            prediction: (N, ...), the denoiser's.
            next: (N, ...), after the step: what is asked about.
            noise: (N, ...), standard normal: draws what comes next. Without it the mean does.
            storage: the type in which latents are kept.
        """
        table = coefficients(self, schedule)
        mean = combined(latents, rows(table.latents, at), prediction, rows(table.prediction, at))
        return self.around(mean, rows(table.std, at), next=next, noise=noise, storage=storage)

    def around(
        self,
        mean: Tensor,
        std: Tensor,
        *,
        next: Tensor | None = None,
        noise: Tensor | None = None,
        storage: torch.dtype = torch.float32,
    ) -> Step:
        """The step with this mean, (N, ...), and standard deviation, (N,), both float32; else as `step`."""
        if next is None:
            next = mean if noise is None else mean + wide(std, mean) * noise.float()
        next = next.to(storage)
        acts = std > 0
        squares = (next.detach().float() - mean).square().flatten(1).mean(1)
        if self.kind == "cps":  # without the constants of a normal density, which differ from step to step
            logp = -squares
        else:
            safe = std.where(acts, 1)
            logp = -squares / (2 * safe.square()) - safe.log() - 0.5 * math.log(2 * math.pi)
        return Step(next, logp.where(acts, 0), mean, std)


def kl(step: Step, ref_mean: Tensor) -> Tensor:
    """The KL divergence of a step to one with another mean, (N, ...) float32, mean over elements: (N,).

    That of the two normal densities for every kind; 0 where the step is no action.
    """
    acts = step.std > 0
    squares = (step.mean - ref_mean).square().flatten(1).mean(1)
    return (squares / (2 * step.std.where(acts, 1).square())).where(acts, 0)


# ---- The two numbers of a level -------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def coefficients(sampler: Sampler, schedule: Schedule) -> Coefficients:
    """The mean and standard deviation of each step of a schedule.

    Raises:
        UserError: "sde" on a schedule that is not flow matching.
    """
    if sampler.kind == "sde" and schedule.prediction != "flow":
        raise UserError("sampler='sde' is for flow matching (SD3, Flux); this pipeline takes 'ddim' or 'cps'.")
    with torch.inference_mode(False):
        alphas, sigmas = (level.cpu().double() for level in (schedule.alphas, schedule.sigmas))
        sigma, after, left = sigmas[:-1], alphas[1:], sigmas[1:]
        if sampler.kind in get_args(Solver):
            std = torch.zeros_like(sigma)
        else:
            std = noises(sampler, alphas, sigmas)
            std = std.where((left > 0) & (std >= FLOOR), 0)
        if sampler.kind == "sde":
            share = left - std.square() / (2 * sigma)
        else:
            share = (left.square() - std.square()).clamp(min=0).sqrt()
        known = [each.cpu() for each in estimates(schedule)]
        latents = after * known[0] + share * known[2]
        prediction = after * known[1] + share * known[3]
        change = _carried(alphas, sigmas) if sampler.kind == "dpm" else torch.zeros_like(sigma)
        found = (latents, prediction, change, std)
        return Coefficients(*(each.to(schedule.alphas.device) for each in found))


def noises(sampler: Sampler, alphas: Tensor, sigmas: Tensor) -> Tensor:
    """The standard deviation of each step by its formula; (T + 1,) levels give (T,)."""
    alpha, sigma, after, left = alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:]
    level = NOISE_LEVELS.get(sampler.kind, 0.0) if sampler.noise_level is None else sampler.noise_level
    if sampler.kind == "ddim":
        return sampler.eta * left / sigma * (sigma.square() - (alpha * left / after).square()).clamp(min=0).sqrt()
    if sampler.kind == "cps":
        return left * math.sin(level * math.pi / 2)
    # from noise alone the rate is infinite: that of the level after it is taken
    rest = (1 - sigma).where(sigma < 1, 1 - left)
    return level * (sigma / rest * (sigma - left)).sqrt()


def _carried(alphas: Tensor, sigmas: Tensor) -> Tensor:
    """How much of the change of x0 since the step before goes into a step of DPM-Solver++(2M), (T,).

    α' (1 - e^-h) h / 2g with h the step in log(α / σ) and g the step before it. The first step has nothing before it.
    The last one, to no noise at all, and any that is more than `STRETCH` times as long as the one before it are taken
    to first order: flow levels often end in such a leap, across which the change says nothing.
    """
    ratio = alphas[:-1] * sigmas[1:] / (sigmas[:-1] * alphas[1:])  # e^-h, 0 from noise alone and to no noise
    size = -ratio.log()
    carried = torch.zeros_like(ratio)
    inner, before, after = slice(1, len(ratio) - 1), size[:-2], size[1:-1]
    share = (after / (2 * before)).where(after <= STRETCH * before, 0)
    carried[inner] = (alphas[1:] * (1 - ratio))[inner] * share
    return carried
