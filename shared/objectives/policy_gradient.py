"""Policy-gradient losses of groups of completions (GRPO and its kin, RLOO), one value an action.

With logp the log-probability of an action under the policy, old under the policy that took it, ref under a reference,
A the advantage and m the mask of counted actions:

    r = logp - old     log w = r  (importance "token")
                       log w = Σ m r / Σ m  over the row  ("sequence", GSPO)     Σ m r  ("sequence_sum", RLOO)

A loss is a policy term in w and A, from `policy_losses`, plus β times an estimate of the KL divergence to the
reference. Each loss has its way to be reduced, given by `PolicyGradient.weights`: the totals are those of the whole
optimizer step, so that gradients do not depend on how a step is cut. RLOO is `grpo` with importance "sequence_sum":
every action of a row then holds the row's loss, and the mean over the row's actions gives it back once.

A factor on the policy term alone, at least 0 and without gradient (a correction for the sampler, a mask by entropy),
is a factor on the advantage, which may be given for each action: every policy term is homogeneous in A.

Dimension letters: B rows, T actions (tokens, denoising steps), N actions without a grid. Advantages: `advantages`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from shared.objectives.pair_losses import known
from shared.objectives.policy_losses import (
    KL_ESTIMATORS,
    LOSSES,
    MAX_LOG_RATIO,
    capped_exp,
    cispo,
    clipped,
    gamma_weight,
    truncated_ratio,
)
from shared.objectives.reduce import token_weights

Importance = Literal["token", "sequence", "sequence_sum"]


@dataclass(frozen=True)
class PolicyGradient:
    """A policy-gradient loss with its options.

    Args:
        loss_type: one of `LOSSES`. grpo: Shao et al. 2024, arXiv:2402.03300; dr_grpo: Liu et al. 2025,
            arXiv:2503.20783; dapo: arXiv:2503.14476; luspo: arXiv:2602.05261, made for importance "sequence". bnpo is
            dapo under another name here: its mean over a micro-batch would depend on how a step is cut.
        importance: "token"; "sequence" (GSPO: Zheng et al. 2025, arXiv:2507.18071); "sequence_sum" (RLOO: Ahmadian et
            al. 2024, arXiv:2402.14740). vespo weighs whole rows by itself and takes "token".
        epsilon, epsilon_high, delta: see `clipped`, and `cispo` for its epsilon_high.
        beta: β, weight of the KL estimate; 0: no reference is looked at.
        kl_estimator: k1, `logp - ref`; k2, half its square; k3, `e^x - x - 1` with x = ref - logp, never negative.
        bias_corrected_kl: multiply the estimate by the ratio w, with its gradient: then its gradient too is that of
            the KL divergence (DeepSeek-V3.2, arXiv:2512.02556). Without, k1 pulls nowhere on average on-policy.
        sapo_temperature_pos, sapo_temperature_neg: see `sapo`.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: see `vespo`.
        max_actions: the most actions that a row can have, dr_grpo's fixed denominator.

    Raises:
        ValueError: an unknown name, or an option out of its range or without effect.
    """

    loss_type: str = "grpo"
    importance: str = "token"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    bias_corrected_kl: bool = False
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    max_actions: int | None = None

    def __post_init__(self):
        known(self.loss_type, LOSSES, "policy-gradient loss")
        known(self.importance, get_args(Importance), "importance level")
        known(self.kl_estimator, KL_ESTIMATORS, "KL estimator")
        for name in ("epsilon", "epsilon_high", "beta", "vespo_k_pos", "vespo_k_neg"):
            self._check(name, lambda value: value >= 0, "a number of at least 0")
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "vespo_lambda_pos", "vespo_lambda_neg"):
            self._check(name, lambda value: value > 0, "a positive number")
        self._check("delta", lambda value: value > 1, "a number above 1")
        self._check("max_actions", lambda value: value >= 1, "at least 1")
        if self.delta is not None and not self._clips:
            raise ValueError(f"delta bounds the ratio of clipped losses: leave it out with {self.loss_type!r}.")
        if self.loss_type == "vespo" and self.importance != "token":
            raise ValueError(f"vespo weighs whole rows by itself: importance {self.importance!r} does not go with it.")
        if self.loss_type == "dr_grpo" and self.max_actions is None:
            raise ValueError("dr_grpo needs max_actions, the most actions that a row can have.")

    def _check(self, name: str, valid: Callable[[float], bool], allowed: str) -> None:
        value = getattr(self, name)
        if value is not None and not (math.isfinite(value) and valid(value)):
            raise ValueError(f"{name} must be {allowed}, {value!r} was given.")

    @property
    def _clips(self) -> bool:
        return LOSSES[self.loss_type].term is clipped

    def separable(self, on_policy: bool) -> bool:
        """Whether the loss is a sum over actions of functions of their own log-probability, given fixed weights.

        Where it is, `action_losses` with the weights of `on_policy_weights` has the gradient of `row_losses`. Ratios
        of rows tie actions together off-policy. On-policy they do so only through the KL term, whose weights are not
        those of the policy term.

        Args:
            on_policy: old is logp itself.
        """
        if self.importance == "token" and self.loss_type != "vespo":
            return True
        return on_policy and (self.importance == "token" or self.beta == 0)

    def weights(self, mask_BT: Tensor, *, rows: Tensor | float, actions: Tensor | float) -> Tensor:
        """Weights `(B, T)`, float32, whose sum with the losses over the whole optimizer step is the step's loss.

        - grpo, sapo: mean over rows of each row's mean over its actions.
        - bnpo, dapo, cispo, vespo: mean over the step's counted actions.
        - dr_grpo: sum over rows and actions, divided by `rows * max_actions`.
        - luspo: mean over rows of each row's sum.

        Args:
            mask_BT: `(B, T)`, 1 where an action counts.
            rows: rows of the step over all micro-batches and processes; a row that counts no action is a row too.
            actions: counted actions of the step, likewise.
        """
        reduction = LOSSES[self.loss_type].reduction
        if reduction == "action":
            return token_weights(mask_BT, mode="token", denominator=actions)
        if reduction == "row mean":
            return token_weights(mask_BT, mode="sequence", denominator=rows)
        return token_weights(
            mask_BT, mode="fixed", denominator=rows * (self.max_actions if reduction == "fixed" else 1)
        )

    def on_policy_weights(self, weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Weights `(B, T)` with which `action_losses` has, on-policy, the gradient of the weighted `row_losses`.

        The ratio of a row answers to each of its actions: with importance "sequence" by 1 / actions, so that each
        action gets the row's mean weight, with "sequence_sum" fully, so that each gets the row's total. The value of
        the sum is that of `row_losses` only where the weights stay as they are; here only the gradient is promised.

        Args:
            weights_BT: `(B, T)`, from `weights`; a factor on an action's policy term belongs in here where the
                importance is not "token", since advantages are taken to be one a row.
            mask_BT: `(B, T)`, 1 where an action counts.
        """
        if self.importance == "token" or LOSSES[self.loss_type].term is cispo:
            return weights_BT
        mask = mask_BT.to(weights_BT.dtype)
        total = (weights_BT * mask).sum(1, keepdim=True)
        if self.importance == "sequence":
            total = total / mask.sum(1, keepdim=True).clamp_min(1)
        return total * mask

    def action_losses(
        self, logp: Tensor, old: Tensor | None, advantage: Tensor, *, ref: Tensor | None = None
    ) -> Tensor:
        """The loss of each action by itself, as if it were a row of one: right where the loss is `separable`.

        Args:
            logp: any shape.
            old: the same shape; None: on-policy.
            advantage: of a shape that goes with it.
            ref: the same shape; needed where β is not 0.
        """
        return self._losses(logp, logp.detach() if old is None else old, advantage, ref, None)

    def row_losses(
        self,
        logp_BT: Tensor,
        old_BT: Tensor | None,
        advantages_B: Tensor,
        mask_BT: Tensor,
        *,
        ref: Tensor | None = None,
    ) -> Tensor:
        """Losses `(B, T)` for every loss and importance, 0 where the mask is 0; what stands there is not looked at.

        Args:
            logp_BT: `(B, T)`.
            old_BT: `(B, T)`; None: on-policy.
            advantages_B: `(B,)`, or `(B, T)` for one an action.
            mask_BT: `(B, T)`, 1 where an action counts.
            ref: `(B, T)`; needed where β is not 0.
        """
        logp, old, advantages, ref, mask = _on_mask(logp_BT, old_BT, advantages_B, ref, mask_BT)
        return self._losses(logp, old, advantages, ref, mask).masked_fill(~mask, 0)

    def _losses(self, logp: Tensor, old: Tensor, advantage: Tensor, ref: Tensor | None, mask: Tensor | None) -> Tensor:
        log_ratio = logp - old
        log_weight = self._log_weight(log_ratio, mask)
        term = LOSSES[self.loss_type].term
        loss = term(log_weight, logp, advantage, **self._options(term))
        return loss + self.beta * self._kl(logp, ref, log_ratio, mask) if self.beta else loss.expand_as(logp)

    def _options(self, term: Callable) -> dict[str, Any]:
        """Those of the options that a function of `policy_losses` takes."""
        parameters = inspect.signature(term).parameters.values()
        return {p.name: getattr(self, p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}

    def _log_weight(self, log_ratio: Tensor, mask: Tensor | None) -> Tensor:
        """What the loss's policy term takes: S for vespo, log w for the others. `mask` None: each action alone."""
        if self.loss_type != "vespo":
            return self._log_importance(log_ratio, mask)
        held = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return held if mask is None else held.sum(1, keepdim=True)

    def _log_importance(self, log_ratio: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None or self.importance == "token":
            return log_ratio
        total = log_ratio.sum(1, keepdim=True)  # 0 where the mask is 0
        return total if self.importance == "sequence_sum" else total / mask.sum(1, keepdim=True).clamp_min(1)

    def _kl(self, logp: Tensor, ref: Tensor | None, log_ratio: Tensor, mask: Tensor | None) -> Tensor:
        if ref is None:
            raise ValueError(f"beta is {self.beta}: the reference's log-probabilities are needed, none were given.")
        estimate = KL_ESTIMATORS[self.kl_estimator](ref - logp)
        if self.bias_corrected_kl:
            estimate = estimate * capped_exp(self._log_importance(log_ratio, mask))
        return estimate

    @torch.no_grad()
    def metrics(
        self, logp: Tensor, old: Tensor | None, advantages: Tensor, mask: Tensor, ref: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Name -> sum and count, both 0-dim, to be added over micro-batches and processes before they are divided.

        `ratio/mean`, and by the loss `clip_ratio/low_mean`, `clip_ratio/high_mean` and `clip_ratio/region_mean`,
        `cispo_clip_ratio` or `vespo/phi_seq_mean`; `kl` where β is not 0. Means over actions; over rows for what a
        row has one of.

        Args:
            logp, old, advantages, mask, ref: as in `row_losses`; or all `(N,)`, then each action is taken by itself.
        """
        logp, old, advantages, ref, mask = _on_mask(logp, old, advantages, ref, mask)
        grid = mask if logp.ndim == 2 else None
        log_ratio = logp - old
        log_weight = self._log_weight(log_ratio, grid)
        counted = mask.any(1, keepdim=True) if log_weight.shape != mask.shape else mask
        if advantages.shape != log_weight.shape and log_weight.shape != mask.shape:
            advantages = advantages.sum(1, keepdim=True)  # of a row; its sign is all that is looked at

        def mean(values: Tensor, where: Tensor = counted) -> tuple[Tensor, Tensor]:
            values = values.expand_as(where).to(logp.dtype)
            return values.masked_fill(~where, 0).sum(), where.sum().to(logp.dtype)

        weight = capped_exp(log_weight)
        found = {"ratio/mean": mean(weight)}
        if self.loss_type == "vespo":
            found["vespo/phi_seq_mean"] = mean(gamma_weight(log_weight, advantages, **self._options(gamma_weight)))
        elif self.loss_type == "cispo":
            found["cispo_clip_ratio"] = mean(
                (truncated_ratio(log_weight, self.epsilon_high) < weight) & (advantages > 0)
            )
        elif self._clips:
            high = self.epsilon if self.epsilon_high is None else self.epsilon_high
            below, above = (weight < 1 - self.epsilon) & (advantages < 0), (weight > 1 + high) & (advantages > 0)
            found |= {
                "clip_ratio/low_mean": mean(below),
                "clip_ratio/high_mean": mean(above),
                "clip_ratio/region_mean": mean(below | above),
            }
        if self.beta:
            found["kl"] = mean(self._kl(logp, ref, log_ratio, grid), mask)
        return found


def _on_mask(
    logp: Tensor, old: Tensor | None, advantages: Tensor, ref: Tensor | None, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """All with 0 where the mask is 0, so that whatever stands there is not looked at; the mask as bool."""
    mask = mask.bool()
    logp = logp.masked_fill(~mask, 0)
    old = logp.detach() if old is None else old.masked_fill(~mask, 0)
    ref = None if ref is None else ref.masked_fill(~mask, 0)
    if advantages.ndim < mask.ndim:
        advantages = advantages.unsqueeze(1)
    elif advantages.shape == mask.shape:
        advantages = advantages.masked_fill(~mask, 0)
    return logp, old, advantages, ref, mask
