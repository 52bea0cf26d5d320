"""PPO with a value function: from scores to token rewards, advantages and returns, and the loss of each action.

A row's actions are the places where its mask is 1, in order; rows may differ in length, and padding may stand on
either side or between (what a tool wrote): an action is followed by the row's next counted one. What stands where the
mask is 0 is not looked at and comes out as 0.

The order of a step: `penalise_missing_eos`, `shaped_scores`, `token_rewards`, if wanted `whiten` without a shift,
`gae`, `whiten`, and `ppo_losses` for each batch of each epoch. Whitening and running moments are in `moments`, the
penalty of each token and the rules that set its weight in `kl_control`. Nothing here runs a model or communicates.

Dimension letters: B rows, T actions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.objectives.moments import RunningMoments, mean_and_variance
from shared.objectives.policy_losses import clipped


def penalise_missing_eos(scores_B: Tensor, ended_B: Tensor, penalty: float) -> Tensor:
    """The scores, less the penalty for each row that did not come to its end. `(B,)`.

    Args:
        scores_B: `(B,)`.
        ended_B: `(B,)` bool, whether a row has its ending token.
        penalty: what is taken off, at least 0.

    Raises:
        ValueError: a negative penalty.
    """
    if not penalty >= 0:
        raise ValueError(f"The penalty for a missing ending token must be at least 0, {penalty!r} was given.")
    return torch.where(ended_B.bool(), scores_B, scores_B - penalty)


def shaped_scores(
    scores_B: Tensor, moments: RunningMoments | None = None, *, shift_mean: bool = False, clip: float | None = None
) -> Tensor:
    """Scores divided by their running deviation, with shift_mean less their running mean before, then clipped.

    Args:
        scores_B: `(B,)`; NaN stays NaN.
        moments: of all scores so far, those given here with them; None: the scores are not scaled. A deviation of 0
            does not scale: nothing is known yet.
        shift_mean: bring them to mean 0 too.
        clip: bound of their size; None: none.

    Returns:
        `(B,)`.

    Raises:
        ValueError: shift_mean without moments, or a bound that is not positive.
    """
    if shift_mean and moments is None:
        raise ValueError("Scores are brought to mean 0 by their running moments: none were given.")
    if clip is not None and not clip > 0:
        raise ValueError(f"The bound of scores must be a positive number, {clip!r} was given.")
    if moments is not None:
        scores_B = (scores_B - moments.mean if shift_mean else scores_B) / (moments.std or 1.0)
    return scores_B if clip is None else scores_B.clamp(-clip, clip)


def token_rewards(scores_B: Tensor, penalty_BT: Tensor | None, mask_BT: Tensor, *, coefficient: float = 0.0) -> Tensor:
    """`-coefficient · penalty` at each action, and a row's score on its last one (Ziegler et al. 2019). `(B, T)`.

    The last action is the ending token, or where a row was cut off the last token that it has.

    Args:
        scores_B: `(B,)`; NaN, where no reward applies, adds nothing.
        penalty_BT: `(B, T)`, see `kl_control.kl_penalty`; None: no penalty.
        mask_BT: `(B, T)`, 1 where an action counts; a row without one gets no reward at all.
        coefficient: weight of the penalty.
    """
    mask = mask_BT.bool()
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    scores = scores_B.detach().nan_to_num(nan=0.0).unsqueeze(1)
    rewards = torch.where(last, scores, torch.zeros_like(scores))
    if penalty_BT is not None:
        rewards = rewards - coefficient * penalty_BT.detach().masked_fill(~mask, 0)
    return rewards


@torch.no_grad()
def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (Schulman et al. 2015, arXiv:1506.02438).

        δ_t = r_t + γ V_{t+1} - V_t     A_t = δ_t + γλ A_{t+1}     R_t = A_t + V_t

    with V and A 0 after a row's last action. λ = 1 gives the rewards to come less the value, λ = 0 the error of one
    step.

    Args:
        rewards_BT: `(B, T)`, see `token_rewards`.
        values_BT: `(B, T)`, V_t: the value of the state in which action t is taken.
        mask_BT: `(B, T)`, 1 where an action counts.
        gamma: γ, in [0, 1].
        lam: λ, in [0, 1].

    Returns:
        Advantages and returns, both `(B, T)` without gradient, 0 where the mask is 0.

    Raises:
        ValueError: γ or λ out of range.
    """
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], {value!r} was given.")
    mask = mask_BT.bool()
    values = values_BT.masked_fill(~mask, 0)
    rewards = rewards_BT.masked_fill(~mask, 0).to(values.dtype)
    advantages = torch.zeros_like(values)
    advantage = following = values.new_zeros(len(values))
    for t in range(values.shape[1] - 1, -1, -1):
        step = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        advantage = torch.where(mask[:, t], step, advantage)
        following = torch.where(mask[:, t], values[:, t], following)
        advantages[:, t] = advantage
    advantages = advantages.masked_fill(~mask, 0)
    return advantages, advantages + values


def value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, epsilon: float | None = 0.2
) -> Tensor:
    """`½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²)`, the clipped value loss of PPO's authors' code.

    The larger of both: a value that has gone beyond ε towards its return gets no gradient any more, one that has gone
    away from it still does (Schulman et al. 2017, arXiv:1707.06347, has the policy's clip alone).

    Args:
        values: V, any shape.
        old_values: V_old, the same shape, of the value function that the advantages are from.
        returns: R, the same shape, see `gae`.
        mask: the same shape, 1 where an action counts.
        epsilon: ε; None: no clip.

    Returns:
        The same shape, 0 where the mask is 0.

    Raises:
        ValueError: ε is not positive.
    """
    values, old_values, returns, _ = _on_mask(values, old_values, returns, mask)
    free, held = _value_errors(values, old_values, returns, epsilon)
    return 0.5 * torch.maximum(free, held)


def ppo_losses(
    logp: Tensor,
    old: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    value_epsilon: float | None = 0.2,
    vf_coef: float = 0.1,
) -> Tensor:
    """PPO's loss of each action: the clipped policy term, and vf_coef times the value loss.

    Schulman et al. 2017, arXiv:1707.06347, eq. 9 without its entropy. Its mean over actions is the loss: reduce it by
    `reduce.token_weights` with the actions of the whole optimizer step.

    Args:
        logp, old: log-probabilities under the policy and under the policy that acted, any shape.
        advantages: the same shape, whitened as a rule.
        values, old_values, returns, mask: see `value_losses`.
        epsilon: see `policy_losses.clipped`.
        value_epsilon: ε of `value_losses`.
        vf_coef: weight of the value loss.

    Returns:
        The same shape, 0 where the mask is 0.

    Raises:
        ValueError: value_epsilon is not positive.
    """
    own, acted, advantages, counted = _on_mask(logp, old, advantages, mask)
    policy = clipped(own - acted.detach(), own, advantages.detach(), epsilon=epsilon)
    value = value_losses(values, old_values, returns, counted, epsilon=value_epsilon)
    return policy + vf_coef * value


@torch.no_grad()
def ppo_metrics(
    logp: Tensor,
    old: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    value_epsilon: float | None = 0.2,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> sum and count, both 0-dim, to be added over micro-batches and processes before they are divided.

    `policy_kl`, the mean of old - logp, for `kl_control.stops_early`; `approx_kl`, that of ½ (old - logp)²;
    `value/mean`, `value/error`, that of (V - R)², and `value/clip_ratio`, the share of actions whose value the clip
    holds. The policy's ratio and clip: `PolicyGradient.metrics`.

    Args:
        logp, old, values, old_values, returns, mask, value_epsilon: as in `ppo_losses`.
    """
    logp, old, values, counted = _on_mask(logp, old, values, mask)
    old_values, returns = (x.masked_fill(~counted, 0) for x in (old_values, returns))
    free, held = _value_errors(values, old_values, returns, value_epsilon)
    count = counted.sum().to(values.dtype)
    found = {
        "policy_kl": old - logp,
        "approx_kl": 0.5 * (old - logp).square(),
        "value/mean": values,
        "value/error": free,
        "value/clip_ratio": (held > free).to(values.dtype),
    }
    return {name: (each.sum(), count) for name, each in found.items()}


def explained_variance(error_sums: Tensor, return_sums: Tensor) -> float:
    """`1 - Var(R - V) / Var(R)`: 1 for perfect values, 0 for a constant, below it for worse; NaN for equal returns.

    Args:
        error_sums, return_sums: `(3,)`, `moments.moment_sums` of R - V and of R, added over processes.
    """
    variance = mean_and_variance(return_sums)[1].item()
    return 1 - mean_and_variance(error_sums)[1].item() / variance if variance else float("nan")


def _value_errors(values: Tensor, old_values: Tensor, returns: Tensor, epsilon: float | None) -> tuple[Tensor, Tensor]:
    """(V - R)², and the same with V held near V_old."""
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"The clip of values must be a positive number, or None for no clip: {epsilon!r} was given.")
    old_values, returns = old_values.detach(), returns.detach()
    free = (values - returns).square()
    if epsilon is None:
        return free, free
    held = old_values + (values - old_values).clamp(-epsilon, epsilon)
    return free, (held - returns).square()


def _on_mask(first: Tensor, second: Tensor, third: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All with 0 where the mask is 0, so that whatever stands there gets no gradient; the mask as bool."""
    counted = mask.bool()
    return *(x.masked_fill(~counted, 0) for x in (first, second, third)), counted
