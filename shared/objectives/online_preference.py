"""Losses of completions that a judge has just compared: online DPO's pairs, XPO and Nash-MD, one value a prompt.

Each prompt has two completions, and the judge says which is better, or how likely the first is to be. Online DPO is a
loss of `pair_losses` on `judged_pairs` (Guo et al. 2024, arXiv:2402.04792). Who samples what, and the mixture of
policy and reference that Nash-MD's other completion is from, are up to the caller. Nothing here is reduced.

Dimension letters: P prompts, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from shared.objectives.pair_losses import PairLoss, Pairs

KLCredit = Literal["future", "token"]


@dataclass
class Answers:
    """One completion of each of P prompts, all `(P,)`.

    Args:
        logp: sum over the completion's tokens, under the policy.
        ref: the same under the reference; None: no reference.
        tokens: how many tokens were counted.
    """

    logp: Tensor
    ref: Tensor | None
    tokens: Tensor


def judged_pairs(first: Answers, second: Answers, first_wins_P: Tensor) -> Pairs:
    """The pairs in the order that the judge gave.

    Args:
        first, second: the two completions of each prompt, both with a reference or both without.
        first_wins_P: `(P,)` bool.

    Raises:
        ValueError: one of them has a reference and the other has not.
    """
    if (first.ref is None) != (second.ref is None):
        raise ValueError("Both completions of a pair need the reference's log-probabilities, or neither.")
    wins = first_wins_P.bool()

    def ordered(one: Tensor | None, other: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if one is None or other is None:
            return None, None
        return torch.where(wins, one, other), torch.where(wins, other, one)

    chosen, rejected = ordered(first.logp, second.logp)
    chosen_tokens, rejected_tokens = ordered(first.tokens, second.tokens)
    ref_chosen, ref_rejected = ordered(first.ref, second.ref)
    return Pairs(chosen, rejected, chosen_tokens, rejected_tokens, ref_chosen, ref_rejected)


def xpo_losses(own: Answers, other: Answers, own_wins_P: Tensor, loss: PairLoss, *, alpha: float = 1e-5) -> Tensor:
    """XPO, `DPO's loss + α log π(y_ref)` (Xie et al. 2024, arXiv:2405.21046, algorithm 1). `(P,)`.

    The second term lowers what the reference would say anyway, which leaves more to answers not tried yet.

    Args:
        own: completions that the policy sampled.
        other: completions y_ref that the reference sampled.
        own_wins_P: `(P,)` bool.
        loss: of pairs, see `pair_losses.paired_loss`; the paper has "sigmoid".
        alpha: α, at least 0; 0: online DPO.

    Raises:
        ValueError: α is negative, see also `judged_pairs`.
    """
    if not alpha >= 0:
        raise ValueError(f"XPO's alpha must be at least 0, {alpha!r} was given.")
    return loss(judged_pairs(own, other, own_wins_P)) + alpha * other.logp


def nash_md_losses(
    logp_PT: Tensor,
    ref_PT: Tensor,
    mask_PT: Tensor,
    probability_P: Tensor,
    *,
    beta: float = 0.1,
    credit: KLCredit = "future",
) -> Tensor:
    """Nash-MD-PG, with the gradient `-(P - ½) ∇ log π(y) + β ∇ KL(π ‖ ref)` (Munos et al. 2023, arXiv:2312.00886).

    `Σ_t (β sg[k_t] - (P - ½)) log π(y_t)`: both terms are score-function estimates, so the value of the loss means
    nothing, and its gradient is right only where the policy itself has just sampled y. ½ is a control variate. What
    sets Nash-MD apart from a policy gradient on a preference is who is compared with y: a sample of the geometric
    mixture of policy and reference.

    Args:
        logp_PT: `(P, T)` log π of each token of y.
        ref_PT: `(P, T)` the same under the reference.
        mask_PT: `(P, T)`, 1 where a token counts; what stands elsewhere is not looked at.
        probability_P: P, `(P,)`: how likely y is to be preferred to the other completion.
        beta: β, the paper's τ.
        credit: k_t, with r = log π - log ref: "future", `Σ_{s ≥ t} r_s`, an unbiased estimate of the divergence's
            gradient; "token", `r_t` alone, of less variance, which leaves out that a token leads to those after it.

    Returns:
        `(P,)`.

    Raises:
        ValueError: another credit, or a negative β.
    """
    if credit not in get_args(KLCredit):
        raise ValueError(f"Unknown credit {credit!r}: choose one of {', '.join(get_args(KLCredit))}.")
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, {beta!r} was given.")
    mask = mask_PT.bool()
    logp, ref = logp_PT.masked_fill(~mask, 0), ref_PT.masked_fill(~mask, 0)
    held_against = (logp - ref).detach()
    if credit == "future":
        held_against = held_against.flip(1).cumsum(1).flip(1)
    return ((beta * held_against - (probability_P.detach().unsqueeze(1) - 0.5)) * logp).sum(1)
