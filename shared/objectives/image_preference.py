"""mDPO: preference pairs whose chosen answer must also be likelier beside its own image than beside a corrupted one.

Wang et al. 2024, arXiv:2406.11839, "mDPO: Conditional preference optimization for multimodal large language models".
To what shared.objectives.preference makes of a pair two terms are added, with the letters of `pair_losses`:

    image   -ls(β(u - log π(y_w | m_l)/ref(y_w | m_l)))      m_l: the corrupted image
    anchor  -ls(βu - δ)                                      which keeps the chosen answer from becoming less likely

Dimension letters: P pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.objectives.pair_losses import Pairs
from shared.objectives.preference import PairLosses, PairObjective


@dataclass
class ImagePairs(Pairs):
    """Pairs with the chosen answer's log-probability beside a corrupted image, all `(P,)`.

    Args:
        corrupted: of the chosen answer, under the policy.
        ref_corrupted: the same under the reference; None: no reference.
        shown: bool, whether the pair has an image that could be corrupted.
    """

    corrupted: Tensor | None = None
    ref_corrupted: Tensor | None = None
    shown: Tensor | None = None

    @property
    def w(self) -> Tensor:
        """The log-ratio beside the corrupted image."""
        return self.corrupted if self.ref_corrupted is None else self.corrupted - self.ref_corrupted


def with_corrupted(
    pairs: Pairs, corrupted: Tensor, ref_corrupted: Tensor | None = None, shown: Tensor | None = None
) -> ImagePairs:
    """Pairs together with what ImagePairs has more, `(P,)` each."""
    known = {f.name: getattr(pairs, f.name) for f in fields(Pairs)}
    return ImagePairs(**known, corrupted=corrupted, ref_corrupted=ref_corrupted, shown=shown)


def image_conditional(pairs: ImagePairs, *, beta: float = 0.1) -> Tensor:
    """`-ls(β(u - w))`, w being u beside the corrupted image; 0 for pairs without image. `(P,)`."""
    losses = -F.logsigmoid(beta * (pairs.u - pairs.w))
    return losses if pairs.shown is None else torch.where(pairs.shown, losses, losses.new_zeros(()))


def anchored(pairs: Pairs, *, beta: float = 0.1, anchor: float = 0.0) -> Tensor:
    """`-ls(βu - δ)`, δ the least reward that the chosen answer should have. `(P,)`."""
    return -F.logsigmoid(beta * pairs.u - anchor)


@dataclass(frozen=True)
class ImageObjective(PairObjective):
    """A PairObjective with mDPO's terms. Made by `with_image_terms`.

    Args:
        image_weight, anchor_weight: of the two terms; 0: none.
        anchor: δ.
    """

    image_weight: float = 0.0
    anchor_weight: float = 0.0
    anchor: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        own = {"image": self.image_weight, "anchor": self.anchor_weight}
        return (*super().names, *(name for name, weight in own.items() if weight))

    def __call__(self, pairs: Pairs) -> PairLosses:
        """The terms of the loss of these pairs, none of them reduced; ImagePairs where the image term has a weight."""
        losses = super().__call__(pairs)
        total, terms = losses.per_pair, dict(losses.terms)
        if self.image_weight:
            assert isinstance(pairs, ImagePairs), "the objective has an image term: the corrupted images are missing"
            value = image_conditional(pairs, beta=self.beta)
            total, terms["image"] = total + self.image_weight * value, value.detach()
        if self.anchor_weight:
            value = anchored(pairs, beta=self.beta, anchor=self.anchor)
            total, terms["anchor"] = total + self.anchor_weight * value, value.detach()
        return replace(losses, per_pair=total, terms=terms)


def with_image_terms(
    objective: PairObjective, *, image_weight: float = 0.0, anchor_weight: float = 0.0, anchor: float = 0.0
) -> PairObjective:
    """An objective with mDPO's terms, whose weights are 1 in the paper.

    Args:
        objective: made by `pair_objective`; its β is that of the terms.
        image_weight: of the term that compares images; 0: none.
        anchor_weight: of the term that keeps the chosen answer likely; 0: none.
        anchor: δ, of that term.

    Raises:
        ValueError: a weight below 0, a number that is not finite, δ without its term.
    """
    for name, value in (("image_loss_weight", image_weight), ("anchor_loss_weight", anchor_weight)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a number of at least 0, {value!r} was given.")
    if not math.isfinite(anchor):
        raise ValueError(f"anchor must be a finite number, {anchor!r} was given.")
    if anchor and not anchor_weight:
        raise ValueError(f"anchor {anchor!r} has no effect without anchor_loss_weight: give that too (1 in mDPO).")
    if not (image_weight or anchor_weight):
        return objective
    own = {f.name: getattr(objective, f.name) for f in fields(PairObjective)}
    return ImageObjective(**own, image_weight=image_weight, anchor_weight=anchor_weight, anchor=anchor)
