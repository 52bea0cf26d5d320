"""From rewards to advantages, and what else is worked out once for a set of completions.

Rows stand prompt by prompt, G for each. A reward is NaN where it does not apply: such a row is left out of every mean
and deviation, and its advantage is 0. Standard deviations are the unbiased ones (divided by n - 1).

Nothing here communicates: with several processes the caller gathers the rewards of all of them first, so that groups
are whole and "batch" means the whole batch. The losses that use advantages: `policy_gradient`.

Dimension letters: P prompts, G completions a prompt, B = P * G rows, K rewards, T actions.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from shared.objectives.policy_losses import capped_exp

Scale = Literal["group", "batch", "none"]
CorrectionMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def weighted_rewards(rewards_BK: Tensor, weights_K: Tensor) -> Tensor:
    """`Σ_k weight_k · reward_k` over the rewards that apply; NaN for a row to which none that counts does.

    Args:
        rewards_BK: `(B, K)`, NaN where a reward does not apply.
        weights_K: `(K,)`; a reward of weight 0 is measured and does not count.

    Returns:
        `(B,)`.
    """
    weights = weights_K.to(rewards_BK)
    total = (rewards_BK * weights).nansum(1)
    return total.masked_fill((rewards_BK.isnan() | (weights == 0)).all(1), torch.nan)


def group_advantages(rewards_B: Tensor, group_size: int, *, scale: Scale = "group", eps: float = 1e-4) -> Tensor:
    """`(R - mean of the group) / (deviation + eps)` (GRPO: Shao et al. 2024, arXiv:2402.03300).

    Args:
        rewards_B: `(B,)`.
        group_size: G.
        scale: the deviation: "group", of the row's group; "batch", of all rows (Liu et al. 2025, arXiv:2508.08221);
            "none", 1 in the place of the divisor (Dr. GRPO: Liu et al. 2025, arXiv:2503.20783).
        eps: what keeps the division from blowing up.

    Returns:
        `(B,)`; 0 for a group whose rewards are all equal, or of which one row at most has a reward.

    Raises:
        ValueError: an unknown scale, an infinite reward, or rows that are not whole groups.
    """
    grouped = _grouped(rewards_B, group_size)
    return _standardised(grouped, rewards_B, scale, eps).nan_to_num(nan=0.0).flatten()


def leave_one_out(rewards_B: Tensor, group_size: int, *, normalize: bool = False, eps: float = 1e-4) -> Tensor:
    """`R - mean of the group's other rewards` (RLOO: Ahmadian et al. 2024, arXiv:2402.14740).

    Args:
        rewards_B: `(B,)`, with the penalty for the KL divergence taken off already.
        group_size: G.
        normalize: bring the advantages of all rows to mean 0 and deviation 1, eps added to the divisor.
        eps: see `normalize`.

    Returns:
        `(B,)`; 0 for a row whose group has no other reward.

    Raises:
        ValueError: an infinite reward, or rows that are not whole groups.
    """
    grouped = _grouped(rewards_B, group_size)
    count = (~grouped.isnan()).sum(1, keepdim=True)
    # R - (sum - R) / (n - 1) = (R - mean) n / (n - 1); 0 / 0 where there is no other row
    advantages = (_centred(grouped, 1) * count / (count - 1)).flatten()
    if normalize:
        advantages = _centred(advantages, 0) / (_deviation(advantages, 0) + eps)
    return advantages.nan_to_num(nan=0.0)


def gdpo_advantages(
    rewards_BK: Tensor, weights_K: Tensor, group_size: int, *, scale: Scale = "group", eps: float = 1e-4
) -> Tensor:
    """`Σ_k weight_k · a_k`, a_k the advantages of reward k alone, brought to mean 0 and deviation 1 over all rows.

    So a reward with a large spread does not drown the others (GDPO, arXiv:2601.05242).

    Args:
        rewards_BK: `(B, K)`, NaN where a reward does not apply.
        weights_K: `(K,)`.
        group_size: G.
        scale: how each reward becomes a_k, see `group_advantages`; the paper has "group".
        eps: see `group_advantages`.

    Returns:
        `(B,)`.

    Raises:
        ValueError: see `group_advantages`.
    """
    own = [_standardised(_grouped(r, group_size), r, scale, eps).flatten() for r in rewards_BK.T.contiguous()]
    total = weighted_rewards(torch.stack(own, 1), weights_K)
    return (_centred(total, 0) / (_deviation(total, 0) + eps)).nan_to_num(nan=0.0)


def zero_std_groups(rewards_B: Tensor, group_size: int) -> Tensor:
    """`(P,)` bool: groups whose rewards are all equal, none of which teaches anything.

    A group of which one row at most has a reward is one of them.

    Raises:
        ValueError: an infinite reward, or rows that are not whole groups.
    """
    grouped = _grouped(rewards_B, group_size)
    missing = grouped.isnan()
    least, most = grouped.masked_fill(missing, torch.inf).amin(1), grouped.masked_fill(missing, -torch.inf).amax(1)
    return least >= most


def importance_correction(
    old_logp: Tensor,
    sampler_logp: Tensor,
    mask: Tensor,
    *,
    mode: CorrectionMode,
    cap: float | None,
    floor: float | None = None,
) -> Tensor:
    """Weights `e^(old - sampler)` for completions from a sampler whose numbers are not the trainer's.

    Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
    training"; masked: IcePop, Ling Team 2025, arXiv:2510.18855). A factor on the policy term: multiply the advantages
    by it.

    Args:
        old_logp: `(B, T)`, of the trainer's model as it was when the completions were sampled.
        sampler_logp: `(B, T)`; NaN where the sampler could not tell: the difference is then taken as 0.
        mask: `(B, T)`, 1 where an action counts.
        mode: "token_…": a weight for each action; "sequence_…": one for the row, of the summed difference.
            "…_truncate": held within [floor, cap]; "…_mask": 0 outside of it.
        cap, floor: the bounds; None: none.

    Returns:
        `(B, T)`, without gradient; 0 where the mask is 0.

    Raises:
        ValueError: an unknown mode, or bounds that are not 0 <= floor < cap.
    """
    if mode not in get_args(CorrectionMode):
        raise ValueError(f"Unknown correction {mode!r}: choose one of {', '.join(get_args(CorrectionMode))}.")
    if cap is not None and not (floor or 0) < cap or floor is not None and floor < 0:
        raise ValueError(f"A correction's bounds need 0 <= floor < cap, {floor!r} and {cap!r} were given.")
    level, _, action = mode.partition("_")
    counted = mask.bool()
    difference = (old_logp - sampler_logp).detach().masked_fill(~counted, 0).nan_to_num(nan=0.0)
    if level == "sequence":
        difference = difference.sum(1, keepdim=True)
    weights = capped_exp(difference)
    held = weights.clamp(min=floor, max=cap) if (floor, cap) != (None, None) else weights
    if action == "mask":
        held = torch.where(held == weights, weights, 0)
    return held.expand_as(counted).masked_fill(~counted, 0)


def top_entropy(entropy: Tensor, mask: Tensor, share: float, *, everywhere: Tensor | None = None) -> Tensor:
    """Bool mask of the counted actions among the `share` of highest entropy (Wang et al. 2025, arXiv:2506.01939).

    A factor on the policy term: multiply the advantages by it.

    Args:
        entropy: of the policy at each action, any shape.
        mask: the same shape, 1 where an action counts.
        share: of the actions, in [0, 1]; 0 keeps those of the highest entropy alone.
        everywhere: `(N,)` entropies of the counted actions of all processes; None: those given here.

    Raises:
        ValueError: the share is not in [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"The share of actions by entropy must be in [0, 1], {share!r} was given.")
    counted = mask.bool()
    values = (entropy[counted] if everywhere is None else everywhere).sort().values
    if not len(values):
        return counted
    # interpolated between neighbours, as torch.quantile does, which takes no more than 2^24 values
    place = (1 - share) * (len(values) - 1)
    below = values[int(place)]
    threshold = below + (place - int(place)) * (values[min(int(place) + 1, len(values) - 1)] - below)
    return counted & (entropy >= threshold)


def pass_at_k(correct_PG: Tensor, k: int) -> Tensor:
    """Chance that one of k completions is right, `1 - C(G - c, k) / C(G, k)` with c right ones, mean over prompts.

    Unbiased (Chen et al. 2021, arXiv:2107.03374).

    Args:
        correct_PG: `(P, G)` bool.
        k: at most G.

    Returns:
        Scalar.

    Raises:
        ValueError: k is not in [1, G].
    """
    count = correct_PG.shape[1]
    if not 1 <= k <= count:
        raise ValueError(f"pass@{k} needs 1 <= k <= {count}, the completions of a prompt.")
    wrong = (~correct_PG.bool()).sum(1, keepdim=True)
    drawn = torch.arange(k, device=correct_PG.device)
    return 1 - ((wrong - drawn).clamp_min(0) / (count - drawn)).prod(1).mean()


def _grouped(rewards_B: Tensor, group_size: int) -> Tensor:
    """`(P, G)`."""
    if group_size < 1 or rewards_B.numel() % group_size:
        raise ValueError(f"{rewards_B.numel()} rewards are not whole groups of {group_size}.")
    if rewards_B.isinf().any():
        raise ValueError("Rewards must be finite numbers, or NaN where a reward does not apply.")
    return rewards_B.reshape(-1, group_size)


def _standardised(grouped_PG: Tensor, rewards_B: Tensor, scale: str, eps: float) -> Tensor:
    if scale not in get_args(Scale):
        raise ValueError(f"Unknown scale {scale!r}: choose one of {', '.join(get_args(Scale))}.")
    centred = _centred(grouped_PG, 1)
    if scale == "none":
        return centred
    deviation = _deviation(grouped_PG, 1) if scale == "group" else _deviation(rewards_B, 0)
    return centred / (deviation + eps)


def _centred(values: Tensor, dim: int) -> Tensor:
    """Less their mean; exactly 0 where all are equal, which a mean alone would miss by a rounding error."""
    shifted = values - values.masked_fill(values.isnan(), -torch.inf).amax(dim, keepdim=True)
    return shifted - shifted.nanmean(dim, keepdim=True)


def _deviation(values: Tensor, dim: int) -> Tensor:
    """Unbiased standard deviation, the dimension kept; 0 where there are fewer than two values."""
    squares = _centred(values, dim).square().nansum(dim, keepdim=True)
    return (squares / ((~values.isnan()).sum(dim, keepdim=True) - 1).clamp_min(1)).sqrt()
