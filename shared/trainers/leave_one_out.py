"""LeaveOneOutTrainer: RLOO's baseline and its divergence in the reward, over PolicyGradientTrainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared.objectives.advantages import leave_one_out, weighted_rewards
from shared.objectives.policy_gradient import PolicyGradient
from shared.trainers.policy_gradient import PolicyGradientTrainer, made_objective
from shared.trainers.rollout import Rollout, cut
from shared.trainers.token_policy_gradient import check_tokens


def leave_one_out_objective(args: Any) -> PolicyGradient:
    """RLOO's objective by TokenUpdateOptions: the clipped ratio of whole samples, β in the reward.

    Raises:
        UserError: options out of range.
    """
    check_tokens(args)
    return made_objective(args, importance="sequence_sum", epsilon=args.epsilon, epsilon_high=args.epsilon_high)


class LeaveOneOutTrainer(PolicyGradientTrainer):
    """REINFORCE with the mean of a group's other samples as baseline (RLOO: Ahmadian et al. 2024, arXiv:2402.14740).

    The divergence to the reference is taken off the reward, β Σ (logp − ref) over the sample's actions.
    """

    def advantages(self, rewards_BK: Tensor, penalty_B: Tensor) -> Tensor:
        total = weighted_rewards(rewards_BK, self.rewards.weights.to(rewards_BK.device))
        if self.args.reward_clip_range is not None:
            total = total.clamp(*self.args.reward_clip_range)
        normalize = self.args.normalize_advantages
        return leave_one_out(total - penalty_B, self.args.num_generations, normalize=normalize)

    def penalty(self, rollout: Rollout) -> Tensor:
        if not self.args.beta:
            return super().penalty(rollout)
        parts = cut(rollout.lengths, self.unit, self.args.per_device_train_batch_size, 1)
        with self.timed("log_probs"):
            if rollout.logp is not None and self.samplers_count:
                rollout.old = list(rollout.logp)
            else:
                self.fill(rollout, "old", parts)
            self.fill(rollout, "ref", parts)
        kl = torch.stack([(own - ref).sum() for own, ref in zip(rollout.old, rollout.ref, strict=True)])
        sums = torch.stack([kl.sum(), rollout.lengths.sum().float()]).to(self.args.device)
        total, count = self.accelerator.reduce(sums, "sum").tolist()
        self._noted["kl"].append(total / count)
        if self.args.mask_truncated_completions:
            kl = kl.masked_fill(rollout.truncated, 0)
        return self.args.beta * kl
