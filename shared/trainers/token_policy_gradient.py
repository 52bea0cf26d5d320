"""TokenPolicyGradientTrainer: policy gradients whose actions are tokens. GRPO and its family, and RLOO.

Over PolicyGradientTrainer it has what only tokens have: the policy's entropy, samples that were cut at their longest,
a server's numerics, losses that are not separable by action.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.objectives.advantages import importance_correction, top_entropy
from shared.objectives.policy_gradient import PolicyGradient
from shared.policies.prefix import evaluating
from shared.trainers.policy_gradient import FlatActions, PolicyGradientTrainer, made_objective
from shared.trainers.rollout import MicroBatch, Rollout, padded


class TokenPolicyGradientTrainer(PolicyGradientTrainer):
    """Group-relative policy gradient of tokens, by TokenUpdateOptions.

    Args:
        As PolicyGradientTrainer.

    Raises:
        UserError: options out of range.
    """

    def __init__(self, model: nn.Module, args: Any, **kwargs: Any):
        self.entropy_coef, self._last_entropy = args.entropy_coef, float("inf")
        self._entropy_seen: list[Tensor] = []
        super().__init__(model, args, **kwargs)
        self.report.units["entropy"] = "nats"

    # ---- Before the update -----------------------------------------------------------------------------------------

    def corrects(self, rollout: Rollout) -> bool:
        known = rollout.logp is not None and not self.actor.exact
        return known and getattr(self.args, "vllm_importance_sampling_correction", False)

    def correct(self, rollout: Rollout) -> None:
        """Truncated importance sampling."""
        args, width = self.args, int(rollout.lengths.max())
        mask = torch.arange(width)[None] < rollout.lengths[:, None]
        old, sampled = padded(rollout.old, width), padded(rollout.logp, width)
        mode, cap = args.vllm_importance_sampling_mode, args.vllm_importance_sampling_cap
        weights = importance_correction(old, sampled, mask, mode=mode, cap=cap)
        rollout.correction = [row[:n].clone() for row, n in zip(weights, rollout.lengths.tolist(), strict=True)]
        apart = (old - sampled).abs()[mask]
        self._noted["sampling/logp_difference"].append(float(apart.mean()))
        self._noted["sampling/importance_ratio"].append(float(weights[mask].mean()))

    # ---- The update ------------------------------------------------------------------------------------------------

    @property
    def skips_idle(self) -> bool:
        args = self.args
        bonus = args.entropy_coef or args.use_adaptive_entropy
        return super().skips_idle and not bonus and not self._selects

    @property
    def _selects(self) -> bool:
        """Whether only actions of high entropy are learnt from."""
        return self.args.top_entropy_quantile < 1

    def skipped(self, rollout: Rollout) -> Tensor:
        return rollout.truncated if self.args.mask_truncated_completions else super().skipped(rollout)

    def prepare_step(self, batches: list[MicroBatch]) -> None:
        self._move_entropy_coef()
        if not self._selects:
            return
        for micro in batches:
            batch = micro.batch.to(self.args.device)
            with torch.no_grad(), evaluating(self.model):
                out = self.policy.log_probs(self.model_wrapped, batch, entropy=True)
            micro.batch.columns["entropy"] = out.entropy.float().cpu()
        own = torch.cat([m.batch.columns["entropy"][m.batch.action_mask.bool()] for m in batches]).to(self.args.device)
        everyones = self.accelerator.pad_across_processes(own, pad_index=float("nan"))
        everyones = self.accelerator.gather(everyones)
        self.step_sums["entropies"] = everyones[~everyones.isnan()]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """This micro-batch's share of the step's loss, times the number of processes."""
        batch, columns, objective = inputs.batch, inputs.batch.columns, self.objective
        mask = batch.action_mask.bool()
        weights = self.action_weights(mask)
        old, ref = columns.get("old"), columns.get("ref")
        advantages = columns["advantages"][:, None].expand(mask.shape)
        separable = objective.separable(old is None)
        bonus = None
        if coef := self._bonus_coef():  # of the step's mean entropy, whatever the loss is divided by
            bonus = -coef * self.args.world_size * mask / self.step_sums["actions"]
        if (factor := self._factor(columns, mask)) is not None:  # of the policy term alone
            if separable and objective.importance != "token":
                weights = weights * factor
            else:
                advantages = advantages * factor
        wanted = {"entropy": bonus is not None or self._logs_next() or self.args.use_adaptive_entropy}
        if separable:
            plain, weights = weights, objective.on_policy_weights(weights, mask) if old is None else weights
            flat = FlatActions(objective, mask, weights, advantages, old, ref)
            if bonus is not None:
                wanted["entropy_weights"] = bonus[mask]
            loss, stats = self.policy.action_objective(model, batch, flat.losses, **wanted)
            if old is None and objective.importance != "token":  # those weights are for the gradient: mend the value
                with torch.no_grad():
                    losses = objective.action_losses(stats.logp, None, advantages[mask])
                loss = loss + (losses * (plain - weights)[mask]).sum()
            grid = torch.zeros_like(weights).masked_scatter(mask, stats.logp.to(weights.dtype))
            entropy = stats.entropy
        else:
            out = self.policy.log_probs(model, batch, **wanted, entropy_gradient=bonus is not None)
            loss = (objective.row_losses(out.logp, old, advantages, mask, ref=ref) * weights).sum()
            if bonus is not None:
                loss = loss + (bonus * out.entropy).masked_fill(~mask, 0).sum()
            grid = out.logp.detach().float()
            entropy = None if out.entropy is None else out.entropy[mask]
        self._remember(inputs, grid)
        self._record(grid, old, columns["advantages"], mask, ref)
        if entropy is not None:
            self._record_entropy(entropy.detach().float())
        return (loss, grid) if return_outputs else loss

    def _factor(self, columns: dict[str, Tensor], mask: Tensor) -> Tensor | None:
        """`(B, T)` what the policy term of each action is multiplied by; None: by 1."""
        factor = columns.get("correction")
        if self._selects:
            share, everywhere = self.args.top_entropy_quantile, self.step_sums["entropies"]
            chosen = top_entropy(columns["entropy"], mask, share, everywhere=everywhere).float()
            factor = chosen if factor is None else factor * chosen
        return factor

    def _record_entropy(self, entropy: Tensor) -> None:
        self.record("entropy", entropy.sum(), entropy.numel())
        if self.args.use_adaptive_entropy:
            self._entropy_seen.append(torch.stack([entropy.sum(), entropy.new_tensor(entropy.numel())]))

    # ---- The entropy bonus -----------------------------------------------------------------------------------------

    def _bonus_coef(self) -> float:
        if self.args.use_adaptive_entropy and self._last_entropy > self.args.entropy_target:
            return 0.0
        return self.entropy_coef

    def _move_entropy_coef(self) -> None:
        """Skywork-OR1's controller (arXiv:2505.22312): up by δ where entropy is below the target, down where not."""
        if not self._entropy_seen:
            return
        args = self.args
        total, count = self.accelerator.reduce(torch.stack(self._entropy_seen).sum(0), "sum").tolist()
        self._entropy_seen = []
        self._last_entropy = total / max(count, 1.0)
        step = args.entropy_coef_delta if self._last_entropy < args.entropy_target else -args.entropy_coef_delta
        self.entropy_coef = min(max(self.entropy_coef + step, args.entropy_coef_min), args.entropy_coef_max)
        self._noted["entropy_coef"].append(self.entropy_coef)

    def controllers(self) -> dict[str, Any]:
        seen = torch.stack(self._entropy_seen).sum(0).tolist() if self._entropy_seen else None
        return {"entropy_coef": self.entropy_coef, "last_entropy": self._last_entropy, "entropy_seen": seen}

    def load_controllers(self, state: dict[str, Any]) -> None:
        self.entropy_coef, self._last_entropy = state["entropy_coef"], state["last_entropy"]
        if state["entropy_seen"] is not None:
            self._entropy_seen = [torch.tensor(state["entropy_seen"], device=self.args.device)]


def objective_of(args: Any, *, max_actions: int | None) -> PolicyGradient:
    """The objective that PolicyGradientOptions ask for.

    Args:
        max_actions: the most actions that a sample can have.

    Raises:
        UserError: options out of range, or that exclude each other.
    """
    check_tokens(args)
    names = {"importance": "importance_sampling_level", "bias_corrected_kl": "use_bias_correction_kl"}
    known = (f.name for f in fields(PolicyGradient) if f.name != "max_actions")
    return made_objective(
        args, **{name: getattr(args, names.get(name, name)) for name in known}, max_actions=max_actions
    )


def check_tokens(args: Any) -> None:
    """Raise UserError for TokenUpdateOptions that are out of range."""
    if not 0 < args.top_entropy_quantile <= 1:
        raise UserError(f"top_entropy_quantile {args.top_entropy_quantile}: must be above 0 and at most 1.")
