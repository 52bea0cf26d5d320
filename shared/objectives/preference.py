"""Paired preference: from the log-probabilities of chosen and rejected completions to the terms of a loss.

    pairs = pairs_of(policy.logp, policy.mask, reference.logp)
    objective = pair_objective(["sigmoid", "sft"], beta=0.1)               # or cpo_objective, orpo_objective
    losses = objective(pairs)
    loss = losses.total(pairs=number of pairs of the step, tokens=number of chosen tokens of the step)

The losses themselves stand in `pair_losses`, with the letters that they are written in. Nothing here runs a model,
communicates, or knows how a step is cut into micro-batches.

Dimension letters: P pairs, B = 2P rows [chosen, rejected, chosen, …], T completion tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.objectives.divergence import Divergence, capped_expm1, divergence, reverse_kl
from shared.objectives.pair_losses import (
    PAIRED,
    PER_TOKEN,
    PairLoss,
    Pairs,
    known,
    paired_loss,
    takes,
)

# what f-DPO can be said of: the losses that see u and v through their difference
_DIVERGED = ("sigmoid", "hinge", "ipo", "sigmoid_norm", "exo_pair", "robust", "discopop", "sft")
_SORTED = ("aot", "aot_unpaired")
_CPO = ("sigmoid", "hinge", "ipo", "simpo", "alphapo")
_AVERAGED = ("ipo", "simpo", "alphapo")


def pairs_of(
    logp_BT: Tensor,
    mask_BT: Tensor,
    ref_logp_BT: Tensor | None = None,
    *,
    ld_alpha: float | None = None,
    weights: Tensor | None = None,
) -> Pairs:
    """Sum the tokens' log-probabilities into pairs, in float32 at least.

    Args:
        logp_BT: `(B, T)` log-probabilities under the policy; rows alternate between chosen and rejected.
        mask_BT: `(B, T)`, 1 or True where the token counts; elsewhere log-probabilities are not looked at.
        ref_logp_BT: `(B, T)` under the reference.
        ld_alpha: weight of the tokens past the shorter completion's length, see `ld_weights`. None: 1.
        weights: `(P,)` factors of the pairs' losses, see `wpo_weights`.
    """
    mask = mask_BT.bool()
    token_weights = None if ld_alpha is None else ld_weights(mask, ld_alpha)
    chosen, rejected = _row_sums(logp_BT, mask, token_weights)
    reference = (None, None) if ref_logp_BT is None else _row_sums(ref_logp_BT.detach(), mask, token_weights)
    counts = mask.sum(1)
    return Pairs(
        chosen=chosen,
        rejected=rejected,
        chosen_tokens=counts[0::2],
        rejected_tokens=counts[1::2],
        ref_chosen=reference[0],
        ref_rejected=reference[1],
        chosen_nll=None if ld_alpha is None else -_row_sums(logp_BT, mask)[0],
        weights=weights,
    )


def _row_sums(logp_BT: Tensor, mask_BT: Tensor, weights_BT: Tensor | None = None) -> tuple[Tensor, Tensor]:
    logp = logp_BT.to(torch.promote_types(logp_BT.dtype, torch.float32)).masked_fill(~mask_BT, 0)
    sums = (logp if weights_BT is None else weights_BT.to(logp.dtype) * logp).sum(1)
    return sums[0::2], sums[1::2]


def ld_weights(mask_BT: Tensor, ld_alpha: float) -> Tensor:
    """LD-DPO's token weights: 1 for the first min(n_w, n_l) counted tokens of a pair's rows, `ld_alpha` for the rest.

    Liu et al. 2024, arXiv:2409.06411. For the log-probabilities of policy and reference alike.

    Args:
        mask_BT: `(B, T)`, 1 or True where the token counts; rows alternate between chosen and rejected.
        ld_alpha: in [0, 1]; 1 is plain DPO.

    Returns:
        `(B, T)` float32, 0 where the mask is 0.

    Raises:
        ValueError: `ld_alpha` outside [0, 1].
    """
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must lie between 0 and 1, {ld_alpha!r} was given.")
    mask = mask_BT.bool()
    shared = mask.sum(1).view(-1, 2).amin(1).repeat_interleave(2)
    position = mask.cumsum(1)
    return torch.where(position <= shared[:, None], 1.0, ld_alpha) * mask


@torch.no_grad()
def wpo_weights(logp_BT: Tensor, collision_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """WPO's weight of each pair, `w(y_w) w(y_l)` with `w(y) = exp(mean_t(log p_t - log Σ_v p_v²))`, without gradient.

    Near 1 where the policy itself would have written the pair (Zhou et al. 2024, arXiv:2406.11827, eq. 2).

    Args:
        logp_BT: `(B, T)` log-probabilities under the policy; rows alternate between chosen and rejected.
        collision_BT: `(B, T)` `log Σ_v p_v²` of the policy at each token.
        mask_BT: `(B, T)`, 1 or True where the token counts.

    Returns:
        `(P,)`.
    """
    mask = mask_BT.bool()
    aligned = (logp_BT - collision_BT).masked_fill(~mask, 0).sum(1) / mask.sum(1).clamp_min(1)
    return (aligned[0::2] + aligned[1::2]).exp()


@dataclass
class PairLosses:
    """What an objective makes of P pairs.

    Args:
        per_pair: `(P,)` weighted sum of the terms whose mean is taken over pairs.
        per_token: `(P,)` weighted sum of the terms that are sums over the tokens of the chosen completion.
        terms: each term by its name, `(P,)`, without weights and without gradient.
        chosen_rewards, rejected_rewards: `(P,)` implicit rewards, without gradient.
    """

    per_pair: Tensor
    per_token: Tensor
    terms: dict[str, Tensor]
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    def total(self, *, pairs: Tensor | float, tokens: Tensor | float) -> Tensor:
        """Scalar: the loss, over the pairs and the chosen tokens of the whole optimizer step."""
        return self.per_pair.sum() / pairs + self.per_token.sum() / tokens


@dataclass(frozen=True)
class PairObjective:
    """Weighted sum of pair losses. Made by `pair_objective`, `cpo_objective` or `orpo_objective`.

    Args:
        losses: the terms by name.
        weights: their weights, by name.
        beta: factor of the implicit rewards.
        prepare: what is done to the pairs before rewards and losses see them.
        divergence: f-DPO's map of the log-ratios, which the rewards do not see.
        use_weighting: multiply all but the per-token terms by `Pairs.weights`.
    """

    losses: dict[str, PairLoss]
    weights: dict[str, float]
    beta: float
    prepare: Callable[[Pairs], Pairs] | None = None
    divergence: Divergence = reverse_kl
    use_weighting: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the terms."""
        return tuple(self.losses)

    def __call__(self, pairs: Pairs) -> PairLosses:
        """The terms of the loss of these pairs, none of them reduced."""
        if self.prepare is not None:
            pairs = self.prepare(pairs)
        rewards = self.beta * pairs.u.detach(), self.beta * pairs.v.detach()
        if self.divergence is not reverse_kl:
            pairs = pairs.diverged(self.divergence)
        sums = {False: torch.zeros_like(pairs.chosen), True: torch.zeros_like(pairs.chosen)}
        terms = {}
        for name, loss in self.losses.items():
            value = loss(pairs)
            terms[name] = value.detach()
            per_token = name in PER_TOKEN
            if self.use_weighting and not per_token:
                assert pairs.weights is not None, "the objective weights its pairs: Pairs.weights is missing"
                value = value * pairs.weights
            sums[per_token] = sums[per_token] + self.weights[name] * value
        return PairLosses(sums[False], sums[True], terms, *rewards)


def pair_objective(
    loss_types: str | Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    use_weighting: bool = False,
) -> PairObjective:
    """The DPO family: `Σ_i w_i L_i` over losses of `PAIRED`.

    MPO (Wang et al. 2024, arXiv:2411.10442) is sigmoid, bco_pair and sft with weights 0.8, 0.2 and 1; RPO
    (Pang et al. 2024, arXiv:2404.19733) is sigmoid and sft.

    Args:
        loss_types: one name, or a list of them.
        weights: one a loss; None: 1 each.
        beta: β.
        label_smoothing: ε, of the losses that have it: sigmoid, exo_pair, robust, aot, aot_unpaired.
        discopop_tau: τ of discopop.
        f_divergence: a key of `divergence.DIVERGENCES`; other than "reverse_kl" only for losses of u - v.
        f_alpha: α of "alpha_divergence".
        use_weighting: WPO: `Pairs.weights` multiplies the losses, but not sft, which is no loss of a pair.

    Raises:
        ValueError: an unknown or repeated name, an option out of its range, or one that none of the losses looks at.
    """
    names = [loss_types] if isinstance(loss_types, str) else list(loss_types)
    if not names:
        raise ValueError(f"No preference loss was given: choose from {', '.join(PAIRED)}.")
    for name in names:
        known(name, PAIRED)
    if len(set(names)) < len(names):
        raise ValueError(f"A preference loss is listed twice in {names}: give it once, with the sum of its weights.")
    options = {"beta": beta, "label_smoothing": label_smoothing, "discopop_tau": discopop_tau}
    losses = {name: paired_loss(name, **options) for name in names}
    if label_smoothing and not any(takes(name, "label_smoothing") for name in names):
        _refuse_smoothing(names, label_smoothing, PAIRED)
    if f_divergence != "reverse_kl" and (unfit := [name for name in names if name not in _DIVERGED]):
        raise ValueError(
            f"The divergence {f_divergence!r} is not defined for {', '.join(unfit)}: "
            f"choose reverse_kl, or losses from {', '.join(_DIVERGED)}."
        )
    if use_weighting and (unfit := [name for name in names if name in _SORTED]):
        raise ValueError(f"A weight of each pair (WPO) does not fit {', '.join(unfit)}, where pairs are sorted apart.")
    return PairObjective(
        losses,
        _weights_by_name(names, weights),
        beta,
        divergence=divergence(f_divergence, alpha=f_alpha),
        use_weighting=use_weighting,
    )


def _weights_by_name(names: list[str], weights: Sequence[float] | None) -> dict[str, float]:
    if weights is None:
        weights = [1.0] * len(names)
    if len(weights) != len(names):
        raise ValueError(
            f"{len(weights)} weights were given for {len(names)} losses ({', '.join(names)}): give one weight each."
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"The weights of the losses must be finite numbers, {list(weights)} were given.")
    return dict(zip(names, map(float, weights), strict=True))


def _refuse_smoothing(names: Sequence[str], label_smoothing: float, among: Sequence[str]) -> None:
    having = [name for name in among if takes(name, "label_smoothing")]
    raise ValueError(
        f"label_smoothing={label_smoothing!r} has no effect on {', '.join(names)}: "
        f"set it to 0, or choose a loss that has it ({', '.join(having)})."
    )


def cpo_objective(
    loss_type: str = "sigmoid",
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    simpo_gamma: float = 0.5,
    alpha: float = 0.0,
    cpo_alpha: float = 1.0,
) -> PairObjective:
    """CPO and its kin, without a reference: a pair loss plus `cpo_alpha` times the chosen completion's NLL.

    - sigmoid: CPO, `-ls(β(log π(y_w) - log π(y_l)))` (Xu et al. 2024, arXiv:2401.08417); hinge likewise.
    - ipo, simpo: on mean log-probabilities of a token (SimPO: Meng et al. 2024, arXiv:2405.14734).
    - alphapo: simpo without NLL, whatever `cpo_alpha`, meant for `alpha` ≠ 0 (Gupta et al. 2025, arXiv:2501.03884).

    The NLL is the mean over the batch's chosen completion tokens, prompts not counted.

    Args:
        loss_type: one of the five.
        beta: β.
        label_smoothing: ε, of sigmoid, simpo and alphapo.
        simpo_gamma: γ, the target margin of simpo and alphapo.
        alpha: α of AlphaPO's reward `(1 - p^-α) / α` in the place of log p, for every loss type; 0: log p. p is the
            completion's probability, for ipo, simpo and alphapo the geometric mean over its tokens.
        cpo_alpha: weight of the NLL; 0: none.

    Raises:
        ValueError: an unknown name, or an option out of its range or without effect.
    """
    known(loss_type, _CPO, "CPO loss")
    name = "simpo" if loss_type == "alphapo" else loss_type
    if label_smoothing and not takes(name, "label_smoothing"):
        _refuse_smoothing([loss_type], label_smoothing, ("sigmoid", "simpo"))
    for option, value in (("simpo_gamma", simpo_gamma), ("alpha", alpha), ("cpo_alpha", cpo_alpha)):
        if not math.isfinite(value):
            raise ValueError(f"{option} must be a finite number, {value!r} was given.")

    def prepare(pairs: Pairs) -> Pairs:
        _check_reference_free(pairs)
        if loss_type in _AVERAGED:
            pairs = pairs.averaged()
        if alpha == 0:
            return pairs
        return pairs.scored(-capped_expm1(-alpha * pairs.u) / alpha, -capped_expm1(-alpha * pairs.v) / alpha)

    losses = {name: paired_loss(name, beta=beta, label_smoothing=label_smoothing, simpo_gamma=simpo_gamma)}
    weights = {name: 1.0}
    if cpo_alpha and loss_type != "alphapo":
        losses["sft"], weights["sft"] = paired_loss("sft"), cpo_alpha
    return PairObjective(losses, weights, beta, prepare=prepare)


def orpo_objective(*, beta: float = 0.1) -> PairObjective:
    """ORPO, without a reference: NLL of the chosen completion plus β times the odds-ratio term.

    Hong et al. 2024, arXiv:2403.07691. The NLL is the mean over the batch's chosen completion tokens: the paper has
    P(y_w | x), so prompts are not counted.

    Args:
        beta: the paper's λ.

    Raises:
        ValueError: β is not positive.
    """
    losses = {"sft": paired_loss("sft"), "odds_ratio": paired_loss("odds_ratio", beta=beta)}

    def prepare(pairs: Pairs) -> Pairs:
        _check_reference_free(pairs)
        return pairs.averaged()

    return PairObjective(losses, dict.fromkeys(losses, 1.0), beta, prepare=prepare)


def _check_reference_free(pairs: Pairs) -> None:
    assert pairs.ref_chosen is None and pairs.ref_rejected is None, "CPO and ORPO have no reference"
