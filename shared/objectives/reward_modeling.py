"""Losses of reward models: whole answers compared in pairs, and the single steps of an answer.

One value a pair, or one a step: nothing is reduced here, so that a trainer can divide by the counts of its whole
optimizer step.

Dimension letters: P pairs, C classes of a step (wrong, right).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def pair_reward_loss(
    chosen_P: Tensor, rejected_P: Tensor, *, margin_P: Tensor | None = None, center_coefficient: float = 0.0
) -> Tensor:
    """Bradley-Terry loss of a reward model, `-ls(r_w - r_l - m) + c (r_w + r_l)²`.

    The pair loss is InstructGPT's (Ouyang et al. 2022, arXiv:2203.02155), the margin Llama 2's (Touvron et al. 2023,
    arXiv:2307.09288), centering Eisenstein et al.'s (2023, arXiv:2312.09244).

    Args:
        chosen_P, rejected_P: `(P,)` rewards r_w and r_l. Half precision is widened first.
        margin_P: `(P,)` m, by how much the chosen answer is the better one; None: 0.
        center_coefficient: c, which keeps rewards near 0; 0.01 is usual.

    Returns:
        `(P,)`, float32 at least: the loss is its mean over pairs.

    Raises:
        ValueError: a negative centering coefficient.
    """
    if center_coefficient < 0:
        raise ValueError(f"The centering coefficient must not be negative, {center_coefficient!r} was given.")
    chosen, rejected = _wide(chosen_P), _wide(rejected_P)
    difference = chosen - rejected
    if margin_P is not None:
        difference = difference - margin_P.to(difference.dtype)
    loss = -F.logsigmoid(difference)
    if center_coefficient:
        loss = loss + center_coefficient * (chosen + rejected).square()
    return loss


def step_loss(logits_C: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each step of an answer, right or wrong, at the token that ends the step.

    Process supervision (Uesato et al. 2022, arXiv:2211.14275; Lightman et al. 2023, arXiv:2305.20050).

    Args:
        logits_C: `(…, C)` scores of the classes. Half precision is widened first.
        labels: `(…)` class of each step, 1 or True where it is right; `IGNORED` (-100) where no step ends.

    Returns:
        `(…)`, float32 at least, 0 where the label is `IGNORED`: the loss is its sum over the number of steps.
    """
    classes = logits_C.shape[-1]
    # ignored places may hold anything, and a softmax over infinities has no gradient
    counted = labels != IGNORED
    logits = _wide(logits_C).masked_fill(~counted[..., None], 0)
    losses = F.cross_entropy(
        logits.reshape(-1, classes), labels.long().reshape(-1), ignore_index=IGNORED, reduction="none"
    )
    return losses.reshape(labels.shape)
