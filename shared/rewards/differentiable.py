"""Rewards whose gradient reaches the images that are scored, for training by back-propagation.

The values are those of a RewardSet, kept as what autograd can follow. Deliberately not here: the sampling that the
gradient goes on to, and what becomes of a reward that fails: a gradient has no stand-in, so that ends the run whatever
`on_error` says.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shared.errors import UserError
from shared.rewards.base import FunctionReward, Reward, Sample, WrongCount, without_metadata
from shared.rewards.combine import RewardSet
from shared.rewards.loading import DIFFERENTIABLE
from shared.rewards.places import place_of
from shared.rewards.waiting import run

logger = logging.getLogger(__name__)

Log = Callable[[str, Any], None]


class DifferentiableRewards:
    """Several rewards with their gradient to the images.

    A reward of weight 0 is only looked at: it needs no gradient.

    Args:
        rewards: the rewards and their weights.

    Raises:
        UserError: a reward says of itself that it has no gradient, or waits for a server.

    Example:
        >>> rewards = DifferentiableRewards(RewardSet("brightness_reward"))
        >>> images = torch.full((1, 3, 8, 8), 0.25, requires_grad=True)
        >>> total, parts = rewards(images, [Sample("a red circle", None)])
        >>> total
        tensor([0.2500], grad_fn=<SumBackward1>)
    """

    def __init__(self, rewards: RewardSet):
        self.rewards, self.names = rewards, rewards.names
        self._told: set[str] = set()
        for name, reward, weight in self._each():
            if weight and _declared(reward) is False:
                raise UserError(_refusal(name, "has none"))

    def check(
        self,
        images: Tensor,
        prompts: Sequence[Any],
        columns: Sequence[Mapping[str, Any]] | None = None,
        **context: Any,
    ) -> None:
        """Score examples, and follow the gradient back to them; to be done before the first sampling.

        Args:
            images: `(N, 3, H, W)` of any content; noise is good.
            prompts: N.
            columns: the other columns of each prompt's row; None: there are none.
            context: as of a call.

        Raises:
            UserError: a reward's result is not `(N,)`, is infinite, has no gradient to the images, or no reward
                applies to any of the examples.
        """
        images = images.detach().float().requires_grad_()
        rows = columns or [{}] * len(prompts)
        samples = [Sample(prompt, None, row) for prompt, row in zip(prompts, rows, strict=True)]
        with torch.enable_grad():
            _, parts = self(images, samples, **context)
            sums = [part[~part.isnan()].sum() for part in parts.unbind(1)]
        applies = (~parts.isnan()).any(0)
        for at, (name, _, weight) in enumerate(self._each()):
            if not weight or not applies[at]:
                continue
            (gradient,) = torch.autograd.grad(sums[at], images, retain_graph=True, allow_unused=True)
            if gradient is None:
                raise UserError(_refusal(name, "gave a result that does not follow from the images"))
            if not gradient.isfinite().all():
                raise UserError(f"Reward {name} has a gradient to the image that is not finite: mend it.")
            if not gradient.any():  # it may have one elsewhere, as those with a threshold do
                logger.warning(
                    "Reward %s has a gradient of 0 to all of %d images of noise: nothing is learnt from it where that "
                    "stays so. Rounding, comparing and counting have none.", name, len(images),
                )  # fmt: skip
        if not applies.any():
            raise UserError(
                f"No reward applies to the first {len(prompts)} prompts: {', '.join(self.names)} gave NaN for all, "
                f"such as {str(prompts[0])[:60]!r}. Give prompts that they can judge."
            )

    def __call__(self, images: Tensor, samples: Sequence[Sample], **context: Any) -> tuple[Tensor, Tensor]:
        """Score images.

        Args:
            images: `(N, 3, H, W)` nominally in [0, 1], as decoded: not clamped.
            samples: N with prompt and columns; their outputs are not looked at.
            context: more for the functions that take it, such as `trainer_state`, `log_extra` and `log_metric`.

        Returns:
            The weighted sums `(N,)`, 0 where no reward applies; and each reward's values `(N, K)`, NaN where it does
            not apply. Both have a gradient where the images have one.

        Raises:
            UserError: a reward raises, or its result is not `(N,)`, is infinite, or has no gradient.
        """
        context = {"log_extra": _nothing, "log_metric": _nothing, **context}
        images, parts, total = images.float(), [], []
        for name, reward, weight in self._each():
            score = self._part if weight else _looked_at
            with torch.autocast(images.device.type, enabled=False):  # a model has a precision of its own
                part = score(name, reward, images, samples, context).to(images.device)
            if part.isnan().all() and name not in self._told:
                self._told.add(name)
                logger.warning("Reward %s gave NaN for all %d rows: it applies to none of them.", name, len(samples))
            parts.append(part)
            total.append(weight * part.masked_fill(part.isnan(), 0))
        return torch.stack(total, 1).sum(1), torch.stack(parts, 1)

    def _each(self) -> list[tuple[str, Reward, float]]:
        return list(zip(self.names, self.rewards.rewards, self.rewards.weights.tolist(), strict=True))

    def _part(
        self, name: str, reward: Reward, images: Tensor, samples: Sequence[Sample], context: Mapping[str, Any]
    ) -> Tensor:
        """The values `(N,)` of a reward, with their gradient."""
        try:
            if isinstance(reward, FunctionReward):
                found = reward.returned(samples, context, images)
            else:
                shown = [Sample(each.prompt, image, each.columns) for each, image in zip(samples, images, strict=True)]
                found = reward(shown, context)
            values = _values(without_metadata(found, len(samples), context), len(samples))
        except UserError as error:
            raise UserError(f"Reward {name} failed: {error}") from error
        except Exception as error:  # a user's function may raise anything
            told = f"{type(error).__name__}: {error} {place_of(error)}".strip()
            raise UserError(f"Reward {name} failed: {told}.") from error
        if images.requires_grad and torch.is_grad_enabled() and not (
            isinstance(values, Tensor) and (values.requires_grad or bool(values.isnan().all()))
        ):  # fmt: skip
            raise UserError(_refusal(name, "returned numbers without one"))
        values = torch.as_tensor(values, dtype=torch.float32)
        if values.isinf().any():
            at = int(values.isinf().nonzero()[0, 0])
            raise UserError(f"Reward {name} gave {values[at].item()}, which is not finite, for sample {at}.")
        return values


def _values(found: Any, count: int) -> Any:
    """What a reward returned as a tensor `(N,)` that keeps its gradient, or as a list of numbers.

    Raises:
        WrongCount: it is not one value a row.
    """
    if isinstance(found, (list, tuple)) and found and all(isinstance(each, Tensor) for each in found):
        if any(each.numel() != 1 for each in found):
            raise WrongCount("it returned a list of tensors with more than one number; expected one for each row")
        found = torch.stack([each.reshape(()) for each in found])
    if isinstance(found, Tensor) or hasattr(found, "shape"):
        if tuple(found.shape) != (count,):
            raise WrongCount(f"it returned a tensor of shape {tuple(found.shape)}; expected ({count},), one a row")
        return found
    if not isinstance(found, (list, tuple)) or len(found) != count:
        raise WrongCount(f"it returned {type(found).__name__} {str(found)[:60]!r}; expected a tensor ({count},)")
    return [float("nan") if each is None else each for each in found]


@torch.no_grad()
def _looked_at(
    name: str, reward: Reward, images: Tensor, samples: Sequence[Sample], context: Mapping[str, Any]
) -> Tensor:
    """The values of a reward that takes no part in the training, of the images as a file would show them."""
    shown = [Sample(each.prompt, image, each.columns) for each, image in zip(samples, images.clamp(0, 1), strict=True)]
    found, _ = run(reward, shown, context)
    if isinstance(found, Exception):
        raise UserError(f"Reward {name} failed: {found}") from found
    return found


def _declared(reward: Reward) -> bool | None:
    """Whether a reward says that it has a gradient; None: it does not say."""
    if getattr(reward, "concurrent", False):
        return False
    return getattr(reward, "differentiable", None if isinstance(reward, FunctionReward) else False)


def _refusal(name: str, why: str) -> str:
    return (
        f"Training by back-propagation needs rewards with a gradient to the image, and reward {name} {why}. Of the "
        f"built-in ones these have it: {', '.join(DIFFERENTIABLE)}. Take one of them, give {name} the weight 0 to "
        "only look at it, or train by DDPO, Flow-GRPO or DiffusionNFT, which need no gradient of a reward."
    )


def _nothing(*_: Any) -> None:
    pass
