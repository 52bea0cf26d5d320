"""Which denoising steps of a round are drawn with noise and learnt from.

All that the sampler gives noise (Flow-GRPO, DDPO); a window of them that stands still, is drawn anew for each round
(Flow-GRPO-Fast) or moves on (MixGRPO, arXiv:2507.21802); and of those a share, drawn anew for each round. What is
drawn follows from the seed and the round alone, so that all processes and a resumed run have the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shared.errors import UserError


@dataclass(frozen=True)
class Actions:
    """The steps of one round.

    Args:
        noisy: that are drawn with noise; the solver takes the others.
        learnt: of these, those that are recorded and learnt from, in order.
    """

    noisy: tuple[int, ...]
    learnt: tuple[int, ...]


class ActionWindow:
    """Chooses the steps of a round, by DenoisingOptions.

    Args:
        stochastic: the steps to which the sampler gives noise, in order.
        args: the options.

    Raises:
        UserError: no step has noise, or a window that is not within the steps that have.
    """

    def __init__(self, stochastic: Sequence[int], args: object):
        self.args = args
        if not stochastic:
            raise UserError(
                f"No step of the sampler {args.sampler or ''} has noise (eta {args.eta:g}, noise_level "
                f"{args.noise_level}, {args.num_inference_steps} steps), so that there is nothing to learn from. Give "
                "eta or noise_level above 0, a sampler with noise (ddim, sde, cps), or more steps."
            )
        first, last = stochastic[0], stochastic[-1] + 1
        start, end = max(args.window_start, first), last if args.window_end is None else args.window_end
        size = args.window_size
        if size is not None and not (size >= 1 and args.window_start >= 0 and end <= last and start + size <= end):
            asked = f"{size} from {args.window_start}" + ("" if args.window_end is None else f" to {args.window_end}")
            raise UserError(
                f"window_size {asked}: the steps with noise are {first} to {last - 1} of {args.num_inference_steps}, "
                "and the window must lie within them."
            )
        if not 0 < args.train_timestep_fraction <= 1:
            raise UserError(f"train_timestep_fraction {args.train_timestep_fraction}: must be above 0 and at most 1.")
        for name in ("window_every", "window_stride"):
            if getattr(args, name) < 1:
                raise UserError(f"{name} {getattr(args, name)}: must be at least 1.")
        self.possible = [step for step in stochastic if size is None or start <= step < end]
        self.size = len(self.possible) if size is None else min(size, len(self.possible))
        self.count = max(1, int(self.size * args.train_timestep_fraction))

    def actions(self, drawn: int, step: int) -> Actions:
        """The steps of the round that begins once so many prompts were `drawn`, at this optimizer `step`."""
        random = np.random.default_rng((self.args.seed, drawn))
        places = len(self.possible) - self.size + 1
        at = 0
        if self.args.window == "random":
            at = int(random.integers(places))
        elif self.args.window == "moving":
            at = step // self.args.window_every * self.args.window_stride % places
        noisy = self.possible[at : at + self.size]
        learnt = sorted(random.choice(noisy, self.count, replace=False).tolist()) if self.count < len(noisy) else noisy
        return Actions(tuple(noisy), tuple(learnt))
