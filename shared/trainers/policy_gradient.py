"""PolicyGradientTrainer: a round's rewards become advantages, and those the gradient of log-probabilities.

Any policy, any action. The loss of an optimizer step does not depend on how its rows are cut into micro-batches and
processes: it is divided by the step's own rows and actions. What only tokens have, entropy for one, is in
token_policy_gradient. No critic: that is PPO's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.objectives.advantages import (
    gdpo_advantages,
    group_advantages,
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
        super().__init__(model, args, **kwargs)
        self.reference: Reference = self.reference_of(ref_model) if args.beta else NoReference()
        self.report.units = {"loss": "", "kl": "nats"}

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
        if self.actor.unit == "token":
            figures |= completion_figures(lengths, truncated)
        return {name: float(value) for name, value in figures.items()}

    # ---- Log-probabilities before the update -----------------------------------------------------------------------

    @property
    def samplers_count(self) -> bool:
        """Whether the sampler's log-probabilities are those that the policy would give."""
        whole = self.accelerator.mixed_precision == "no" and self.model.dtype == torch.float32
        return self.actor.exact and whole

    def before_updates(self, buffer: Buffer) -> None:
        rollout, window = buffer.rollout, self.args.gradient_accumulation_steps
        if rollout.logp is not None and self.samplers_count:
            rollout.old = list(rollout.logp)
        else:
            late = [rows for at, rows in enumerate(buffer.cut) if (self._phase + at) // window > 0]
            self.fill(rollout, "old", buffer.cut if self.corrects(rollout) else late)
        if self.corrects(rollout):
            self.correct(rollout)
        if self.objective.beta:
            self.fill(rollout, "ref", buffer.cut)

    def corrects(self, rollout: Rollout) -> bool:
        """Whether samples are weighed for a sampler with other numerics."""
        return False

    def correct(self, rollout: Rollout) -> None:
        """Put weights into `rollout.correction`, once all of `rollout.old` is known."""
        raise NotImplementedError

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

    # ---- The update ------------------------------------------------------------------------------------------------

    @property
    def skips_idle(self) -> bool:
        """Whether a sample whose advantage is zero adds nothing to the loss."""
        return not self.objective.beta

    def skipped(self, rollout: Rollout) -> Tensor:
        """`(B,)` bool, samples that nothing is learnt from."""
        return torch.zeros_like(rollout.truncated)

    def kept(self, rollout: Rollout, rows: list[int]) -> tuple[list[int], int]:
        """Those of a micro-batch's rows that the model is run on, and how many of a prompt stand together there."""
        unit, skipped = self.unit, self.skipped(rollout)
        if not self.skips_idle:
            return rows, unit
        units = [rows[at : at + unit] for at in range(0, len(rows), unit)]
        kept = [row for own in units if bool((rollout.advantages[own][~skipped[own]] != 0).any()) for row in own]
        if kept:
            return kept, unit
        # every process runs its model in every micro-batch: of one that teaches nothing one row
        return [min(rows, key=lambda row: int(rollout.lengths[row]))], 1

    def micro_batch(self, buffer: Buffer, rows: list[int]) -> MicroBatch:
        rollout = buffer.rollout
        on_policy = buffer.born == self.state.global_step
        skipped = self.skipped(rollout)
        actions = int(rollout.lengths[rows][~skipped[rows]].sum())
        kept, unit = self.kept(rollout, rows)
        batch = self.actor.batch(rollout, kept, unit, skipped=skipped)
        width = batch.action_mask.shape[1]
        batch.columns["advantages"] = rollout.advantages[kept]
        for name in ("old", "ref", "correction"):
            values = [held[row] for row in kept] if (held := getattr(rollout, name)) else [None]
            if all(value is not None for value in values) and not (name == "old" and on_policy):
                batch.columns[name] = padded(values, width)
        self._noted["frac_rows_trained"].append(len(kept) / len(rows))
        return MicroBatch(batch, rollout, kept, (len(rows), actions), on_policy)

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
        flat = FlatActions(objective, mask, weights, advantages, old, ref)
        loss, stats = self.policy.action_objective(model, batch, flat.losses, **self.beside(batch, weights))
        grid = torch.zeros_like(weights).masked_scatter(mask, stats.logp.to(weights.dtype))
        self.look_at(inputs, stats)
        self._remember(inputs, grid)
        self._record(grid, old, columns["advantages"], mask, ref)
        return (loss, grid) if return_outputs else loss

    def beside(self, batch: Any, weights: Tensor) -> dict[str, Any]:
        """More that the policy is to take into the loss; `weights` `(B, T)` are those of the actions."""
        return {}

    def look_at(self, inputs: MicroBatch, stats: Any) -> None:
        """Called with what the policy saw of a micro-batch."""

    def action_weights(self, mask: Tensor) -> Tensor:
        """`(B, T)` what each action's loss is multiplied by, times the number of processes, whose mean is taken."""
        rows, actions = self.step_sums["rows"], self.step_sums["actions"]
        return self.objective.weights(mask, rows=rows, actions=actions) * self.args.world_size

    def _remember(self, inputs: MicroBatch, logp: Tensor) -> None:
        """Keep what the policy gave before its update, for the rounds' further iterations."""
        if not inputs.on_policy or self.args.num_iterations == 1:
            return
        values, rollout = logp.cpu(), inputs.rollout
        for at, row in enumerate(inputs.rows):
            if rollout.old[row] is None:
                rollout.old[row] = values[at, : rollout.lengths[row]].clone()

    def _record(self, logp: Tensor, old: Tensor | None, advantages: Tensor, mask: Tensor, ref: Tensor | None) -> None:
        with torch.no_grad():
            figures = self.objective.metrics(logp, old, advantages, mask, ref=ref)
        for name, (total, count) in figures.items():
            self.record(name, total, count)


class FlatActions:
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


def completion_figures(lengths: Tensor, truncated: Tensor) -> dict[str, Tensor]:
    """How long completions are, by their lengths and whether they were cut, both `(B,)` float."""
    ended = lengths[truncated == 0]
    return {
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": truncated.mean(),
        "completions/mean_terminated_length": ended.mean() if len(ended) else ended.new_zeros(()),
    }


def _split(whole: Tensor, facts: int) -> tuple[Tensor, list[Tensor]]:
    """Rewards `(B, K)`, and the columns behind them."""
    return whole[:, :-facts], list(whole[:, -facts:].unbind(1))


def made_objective(args: Any, **options: Any) -> PolicyGradient:
    """PolicyGradient with these options; `args` are UpdateOptions.

    Raises:
        UserError: options out of range.
    """
    if args.beta < 0:
        raise UserError(f"beta {args.beta}: must be at least 0; 0 leaves the reference out.")
    try:
        return PolicyGradient(**options)
    except ValueError as error:  # an objective's own words for its options
        raise UserError(str(error)) from error
