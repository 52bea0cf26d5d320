"""PolicyGradientTrainer: a round's rewards become advantages, and those the gradient of log-probabilities.

GRPO and its family, and RLOO, on any policy. The loss of an optimizer step does not depend on how its rows are cut
into micro-batches and processes: it is divided by the step's own rows and actions. No critic: that is PPO's.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.objectives.advantages import (
    gdpo_advantages,
    group_advantages,
    importance_correction,
    top_entropy,
    weighted_rewards,
    zero_std_groups,
)
from shared.objectives.policy_gradient import PolicyGradient
from shared.policies.prefix import evaluating
from shared.trainers.online import OnlineTrainer
from shared.trainers.reference import NoReference, Reference
from shared.trainers.rollout import Buffer, MicroBatch, Rollout, padded


class PolicyGradientTrainer(OnlineTrainer):
    """Group-relative policy gradient.

    Args:
        objective: the loss of an action; see shared.objectives.policy_gradient.PolicyGradient.
        ref_model: what `reference_of` is given, once the trainer, and with it the engine, is there.
        As OnlineTrainer otherwise.
    """

    def __init__(
        self, model: nn.Module, args: Any, *, objective: PolicyGradient, ref_model: Any = None, **kwargs: Any
    ):
        self.objective = objective
        self.entropy_coef, self._last_entropy = args.entropy_coef, float("inf")
        self._entropy_seen: list[Tensor] = []
        super().__init__(model, args, **kwargs)
        self.reference: Reference = self.reference_of(ref_model) if args.beta else NoReference()
        self.report.units = {"loss": "", "entropy": "nats", "kl": "nats"}

    def reference_of(self, ref_model: Any) -> Reference:
        """The reference that β holds the policy near to."""
        raise NotImplementedError

    # ---- What the rewards mean -------------------------------------------------------------------------------------

    def advantages(self, rewards_BK: Tensor, penalty_B: Tensor) -> Tensor:
        """Advantages `(B,)` of a round's samples over all processes, groups of `num_generations` together.

        To be overridden for another rule.

        Args:
            rewards_BK: `(B, K)` each reward's values, NaN where it does not apply.
            penalty_B: `(B,)` what is taken off a sample's reward; see `penalty`.
        """
        args, weights = self.args, self.rewards.weights.to(rewards_BK.device)
        scale = {True: "group", False: "none"}.get(args.scale_rewards, args.scale_rewards)
        if args.multi_objective_aggregation == "normalize_then_sum":
            return gdpo_advantages(rewards_BK, weights, args.num_generations, scale=scale)
        total = weighted_rewards(rewards_BK, weights) - penalty_B
        return group_advantages(total, args.num_generations, scale=scale)

    def penalty(self, rollout: Rollout) -> Tensor:
        """`(B,)` what is taken off the rewards of this process's samples before they are compared."""
        return torch.zeros(rollout.rows)

    def finish_round(self, rollout: Rollout) -> dict[str, float]:
        count = rollout.rows
        rollout.old, rollout.ref = [None] * count, [None] * count
        facts = [rollout.total, self.penalty(rollout), rollout.lengths.float(), rollout.truncated.float()]
        own = torch.cat([rollout.rewards.float(), torch.stack(facts, 1)], 1).to(self.args.device)
        rewards, (total, penalty, lengths, truncated) = _split(self.accelerator.gather(own), len(facts))
        advantages = self.advantages(rewards, penalty).float()
        if advantages.shape != total.shape or not advantages.isfinite().all():
            raise UserError(
                f"{type(self).__name__}.advantages gave {list(advantages.shape)} values"
                f"{'' if advantages.isfinite().all() else ', not all of them finite'}: it has to give {len(total)} "
                "finite numbers, one a sample."
            )
        start = self.args.process_index * count
        rollout.advantages = advantages[start : start + count].cpu()
        return self._figures(rewards, total, lengths, truncated)

    def _figures(self, rewards: Tensor, total: Tensor, lengths: Tensor, truncated: Tensor) -> dict[str, float]:
        given = total[~total.isnan()]
        figures = {"reward": given.mean(), "reward_std": given.std()} if len(given) > 1 else {}
        for name, values in zip(self.rewards.names, rewards.unbind(1), strict=True):
            if len(values := values[~values.isnan()]) > 1:
                figures |= {f"rewards/{name}/mean": values.mean(), f"rewards/{name}/std": values.std()}
        figures["frac_reward_zero_std"] = zero_std_groups(total, self.args.num_generations).float().mean()
        ended = lengths[truncated == 0]
        figures |= {
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": truncated.mean(),
            "completions/mean_terminated_length": ended.mean() if len(ended) else ended.new_zeros(()),
        }
        return {name: float(value) for name, value in figures.items()}

    # ---- Log-probabilities before the update -----------------------------------------------------------------------

    @property
    def samplers_count(self) -> bool:
        """Whether the sampler's log-probabilities are those that the policy would give."""
        whole = self.accelerator.mixed_precision == "no" and self.model.dtype == torch.float32
        return self.actor.exact and whole

    def before_updates(self, buffer: Buffer) -> None:
        rollout, window = buffer.rollout, self.args.gradient_accumulation_steps
        known = rollout.logp is not None
        corrects = known and not self.actor.exact and getattr(self.args, "vllm_importance_sampling_correction", False)
        if known and self.samplers_count:
            rollout.old = list(rollout.logp)
        else:
            late = [rows for at, rows in enumerate(buffer.cut) if corrects or (self._phase + at) // window > 0]
            self.fill(rollout, "old", late)
        if corrects:
            self._correct(rollout)
        if self.objective.beta:
            self.fill(rollout, "ref", buffer.cut)

    def fill(self, rollout: Rollout, name: str, parts: list[list[int]]) -> None:
        """Log-probabilities of some rows under the policy as it is (`old`) or the reference (`ref`), part by part."""
        held = getattr(rollout, name)
        for rows in parts:
            if all(held[row] is not None for row in rows):
                continue
            batch = self.actor.batch(rollout, rows, self.unit).to(self.args.device)
            if name == "ref":
                logp = self.reference.log_probs(self.model_wrapped, batch)
            else:
                with torch.no_grad(), evaluating(self.model):
                    logp = self.policy.log_probs(self.model_wrapped, batch).logp
            logp = logp.float().cpu()
            for at, row in enumerate(rows):
                held[row] = logp[at, : rollout.lengths[row]].clone()

    def _correct(self, rollout: Rollout) -> None:
        """Weights of samples whose sampler had other numerics than the policy (truncated importance sampling)."""
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
        """Whether a sample whose advantage is zero adds nothing to the loss."""
        args = self.args
        return not (self.objective.beta or args.entropy_coef or args.use_adaptive_entropy) and not self._selects

    @property
    def _selects(self) -> bool:
        """Whether only actions of high entropy are learnt from."""
        return self.args.top_entropy_quantile < 1

    def micro_batch(self, buffer: Buffer, rows: list[int]) -> MicroBatch:
        rollout = buffer.rollout
        on_policy = buffer.born == self.state.global_step
        skipped = rollout.truncated if self.args.mask_truncated_completions else torch.zeros_like(rollout.truncated)
        actions = int(rollout.lengths[rows][~skipped[rows]].sum())
        kept, unit = rows, self.unit
        if self.skips_idle:
            units = [rows[at : at + unit] for at in range(0, len(rows), unit)]
            kept = [row for own in units if bool((rollout.advantages[own][~skipped[own]] != 0).any()) for row in own]
            if not kept:  # every process runs its model in every micro-batch: of one that teaches nothing one row
                kept, unit = [min(rows, key=lambda row: int(rollout.lengths[row]))], 1
        batch = self.actor.batch(rollout, kept, unit, skipped=skipped)
        width = batch.action_mask.shape[1]
        batch.columns["advantages"] = rollout.advantages[kept]
        for name in ("old", "ref", "correction"):
            values = [held[row] for row in kept] if (held := getattr(rollout, name)) else [None]
            if all(value is not None for value in values) and not (name == "old" and on_policy):
                batch.columns[name] = padded(values, width)
        self._noted["frac_rows_trained"].append(len(kept) / len(rows))
        return MicroBatch(batch, rollout, kept, (len(rows), actions), on_policy)

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
        self.step["entropies"] = everyones[~everyones.isnan()]

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
        weights = objective.weights(mask, rows=self.step["rows"], actions=self.step["actions"]) * self.args.world_size
        old, ref = columns.get("old"), columns.get("ref")
        advantages = columns["advantages"][:, None].expand(mask.shape)
        separable = objective.separable(old is None)
        bonus = None
        if coef := self._bonus_coef():  # of the step's mean entropy, whatever the loss is divided by
            bonus = -coef * self.args.world_size * mask / self.step["actions"]
        if (factor := self._factor(columns, mask)) is not None:  # of the policy term alone
            if separable and objective.importance != "token":
                weights = weights * factor
            else:
                advantages = advantages * factor
        wanted = {"entropy": bonus is not None or self._logs_next() or self.args.use_adaptive_entropy}
        if separable:
            plain, weights = weights, objective.on_policy_weights(weights, mask) if old is None else weights
            flat = _Flat(objective, mask, weights, advantages, old, ref)
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
        self._record(grid, old, columns["advantages"], mask, ref, entropy)
        return (loss, grid) if return_outputs else loss

    def _factor(self, columns: dict[str, Tensor], mask: Tensor) -> Tensor | None:
        """`(B, T)` what the policy term of each action is multiplied by; None: by 1."""
        factor = columns.get("correction")
        if self._selects:
            share, everywhere = self.args.top_entropy_quantile, self.step["entropies"]
            chosen = top_entropy(columns["entropy"], mask, share, everywhere=everywhere).float()
            factor = chosen if factor is None else factor * chosen
        return factor

    def _remember(self, inputs: MicroBatch, logp: Tensor) -> None:
        """Keep what the policy gave before its update, for the rounds' further iterations."""
        if not inputs.on_policy or self.args.num_iterations == 1:
            return
        values, rollout = logp.cpu(), inputs.rollout
        for at, row in enumerate(inputs.rows):
            if rollout.old[row] is None:
                rollout.old[row] = values[at, : rollout.lengths[row]].clone()

    def _record(
        self, logp: Tensor, old: Tensor | None, advantages: Tensor, mask: Tensor, ref: Tensor | None, entropy: Any
    ) -> None:
        with torch.no_grad():
            figures = self.objective.metrics(logp, old, advantages, mask, ref=ref)
        for name, (total, count) in figures.items():
            self.record(name, total, count)
        if entropy is not None:
            entropy = entropy.detach().float()
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


class _Flat:
    """What the counted actions of a batch need, in one row: their losses are asked for some at a time."""

    def __init__(
        self,
        objective: PolicyGradient,
        mask: Tensor,
        weights: Tensor,
        advantages: Tensor,
        old: Tensor | None,
        ref: Tensor | None,
    ):
        self.objective = objective
        self.weights, self.advantages = weights[mask], advantages[mask]
        self.old, self.ref = (None if values is None else values[mask] for values in (old, ref))

    def losses(self, logp: Tensor, at: slice) -> Tensor:
        old, ref = (None if values is None else values[at] for values in (self.old, self.ref))
        return self.objective.action_losses(logp, old, self.advantages[at], ref=ref) * self.weights[at]


def _split(whole: Tensor, facts: int) -> tuple[Tensor, list[Tensor]]:
    """Rewards `(B, K)`, and the columns behind them."""
    return whole[:, :-facts], list(whole[:, -facts:].unbind(1))


def _check(args: Any) -> None:
    if not 0 < args.top_entropy_quantile <= 1:
        raise UserError(f"top_entropy_quantile {args.top_entropy_quantile}: must be above 0 and at most 1.")
    if args.beta < 0:
        raise UserError(f"beta {args.beta}: must be at least 0; 0 leaves the reference out.")


def objective_of(args: Any, *, max_actions: int | None) -> PolicyGradient:
    """The objective that PolicyGradientOptions ask for.

    Args:
        max_actions: the most actions that a sample can have.

    Raises:
        UserError: options out of range, or that exclude each other.
    """
    names = {"importance": "importance_sampling_level", "bias_corrected_kl": "use_bias_correction_kl"}
    known = (f.name for f in fields(PolicyGradient) if f.name != "max_actions")
    return made_objective(
        args, **{name: getattr(args, names.get(name, name)) for name in known}, max_actions=max_actions
    )


def made_objective(args: Any, **options: Any) -> PolicyGradient:
    """PolicyGradient with these options, once what UpdateOptions hold beside them is checked.

    Raises:
        UserError: options out of range.
    """
    _check(args)
    try:
        return PolicyGradient(**options)
    except ValueError as error:  # an objective's own words for its options
        raise UserError(str(error)) from error
