"""ActorCriticTrainer: PPO. Each action has an advantage of its own, which a critic and the rewards to come give it.

The critic stands in the policy's model (shared.policies.critic), so that one call of the wrapped model gives what
both losses need. Neither a round's figures nor an update depend on how samples are cut into micro-batches and
processes: what is averaged is averaged over all of them. The maths: shared.objectives.value and kl_control.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from shared.errors import UserError
from shared.objectives.kl_control import AdaptiveKL, FixedKL, KLController, kl_penalty, skips_batch, stops_early
from shared.objectives.moments import RunningMoments, moment_sums, whiten
from shared.objectives.policy_gradient import PolicyGradient
from shared.objectives.policy_losses import capped_exp
from shared.objectives.value import (
    explained_variance,
    gae,
    penalise_missing_eos,
    ppo_metrics,
    shaped_scores,
    token_rewards,
    value_losses,
)
from shared.policies.critic import attach_critic, detach_critic
from shared.policies.prefix import evaluating
from shared.trainers.critics import critic_tensors, load_critic, save_critic
from shared.trainers.exact_penalty import exact_penalty
from shared.trainers.policy_gradient import FlatActions, PolicyGradientTrainer, made_objective
from shared.trainers.rollout import Buffer, MicroBatch, Rollout, cut, padded

OTHER_NAMES = {"k1": "kl", "k2": "mse"}  # of penalties
KEPT = ("values", "returns", "advantages")  # a round's columns that its updates need


class ActorCriticTrainer(PolicyGradientTrainer):
    """Proximal policy optimisation with generalised advantages (Schulman et al. 2017, arXiv:1707.06347).

    Args:
        As PolicyGradientTrainer; `args` are ActorCriticOptions.

    Raises:
        UserError: options out of range, or that the engine cannot follow.
    """

    def __init__(self, model: nn.Module, args: Any, **kwargs: Any):
        self.kl_control = kl_controller(args)
        self.moments = RunningMoments()
        self._seen: list[Tensor] = []  # sums of the step under way: actions, old - logp, ratio
        detach_critic(model)  # a reference is made of the model alone
        super().__init__(model, args, **kwargs)
        self.report.units["entropy"] = self.report.units["objective/kl"] = "nats"
        if args.ratio_threshold is not None and self.is_deepspeed_enabled:
            raise UserError("ratio_threshold: DeepSpeed steps as it adds up gradients. Leave it out, or use FSDP.")
        attach_critic(self.model, self.make_critic(), self.policy.sharing)
        self.critic_attached()
        self._train_critic_too()
        self.add_callback(Watch(self))

    def make_critic(self) -> nn.Module:
        """The critic, once the trainer and its reference are there."""
        raise NotImplementedError

    def critic_attached(self) -> None:
        """Called once the critic is in the model."""

    def _train_critic_too(self) -> None:
        """Hand the critic to an optimizer that was made before there was one."""
        if self.optimizer is None:
            return
        if self.args.value_learning_rate is not None:
            raise UserError("value_learning_rate: the optimizer is given, and has the learning rates. Leave it out.")
        known = {id(each) for group in self.optimizer.param_groups for each in group["params"]}
        new = [each for each in critic_tensors(self.model).values() if id(each) not in known]
        self.optimizer.param_groups[0]["params"] += new  # a scheduler counts the groups

    def learning_rates(self) -> dict[str, float]:
        if self.args.value_learning_rate is None:
            return super().learning_rates()
        own = {id(each) for each in critic_tensors(self.model).values()}
        names = [name for name, each in self.model.named_parameters() if id(each) in own]
        return {**super().learning_rates(), **dict.fromkeys(names, self.args.value_learning_rate)}

    # ---- A round ---------------------------------------------------------------------------------------------------

    def finish_round(self, rollout: Rollout) -> dict[str, float]:
        """Values, rewards of tokens, advantages and returns, in the order that shared.objectives.value tells."""
        args = self.args
        with self.timed("log_probs"):
            self._look(rollout)
        mask = _counted(rollout)
        scores, penalty = self.scores(rollout), self._penalty(rollout, mask)
        coefficient = self.kl_control.coefficient
        rewards = token_rewards(scores, penalty, mask, coefficient=coefficient)
        figures = self._round_figures(rollout, mask, scores, rewards)
        if args.whiten_rewards:
            rewards = whiten(rewards, mask, self._everyones(moment_sums(rewards, mask)), shift_mean=False)
        values = padded(rollout.columns["values"], mask.shape[1])
        advantages, returns = gae(rewards, values, mask, gamma=args.gamma, lam=args.lam)
        sums = torch.stack([moment_sums(each, mask) for each in (returns - values, returns, advantages)])
        errors, returned, gained = self._everyones(sums)
        figures["value/explained_variance"] = explained_variance(errors, returned)
        rollout.advantages = advantages.sum(1) / mask.sum(1).clamp(min=1)  # of whole samples, for people
        if args.whiten_advantages:
            advantages = whiten(advantages, mask, gained)
        for name, found in (("returns", returns), ("advantages", advantages)):
            rollout.columns[name] = [row[:n].clone() for row, n in zip(found, rollout.lengths.tolist(), strict=True)]
        return {name: value for name, value in figures.items() if value == value}

    def scores(self, rollout: Rollout) -> Tensor:
        """`(B,)` the samples' rewards as they enter the last token's; NaN where none applies."""
        args, scores = self.args, rollout.total.float()
        if args.missing_eos_penalty is not None:
            scores = penalise_missing_eos(scores, ~rollout.truncated, args.missing_eos_penalty)
        if args.use_score_scaling:
            self.moments.update(self._everyones(moment_sums(scores)))
        moments = self.moments if args.use_score_scaling else None
        return shaped_scores(scores, moments, shift_mean=args.use_score_norm, clip=args.score_clip)

    def _look(self, rollout: Rollout) -> None:
        """What policy, critic and reference say of the samples, before anything is learnt from them."""
        args, count = self.args, rollout.rows
        told = rollout.logp is not None and self.samplers_count
        rollout.old = list(rollout.logp) if told else [None] * count
        rollout.ref = [None] * count
        rollout.columns["values"] = [None] * count
        if exact := args.kl_penalty == "full" and bool(args.beta):
            rollout.columns["penalty"] = [None] * count
        for rows in cut(
            rollout.lengths, self._unit(rollout), args.per_device_train_batch_size, args.steps_per_generation
        ):
            batch = self._batch(rollout, rows).to(args.device)
            with torch.no_grad(), evaluating(self.model):
                if told:
                    values = self.policy.values(self.model_wrapped, batch)
                else:
                    found = self.policy.log_probs(self.model_wrapped, batch, values=True)
                    values = found.values
                    _put(rollout.old, rows, found.logp)
            _put(rollout.columns["values"], rows, values)
            if args.beta:
                _put(rollout.ref, rows, self.reference.log_probs(self.model_wrapped, batch))
            if exact:
                _put(rollout.columns["penalty"], rows, exact_penalty(self, batch))
        for held in (rollout.old, rollout.ref, *rollout.columns.values()):
            for row, value in enumerate(held):
                held[row] = None if value is None else value[: rollout.lengths[row]].clone()

    def _unit(self, rollout: Rollout) -> int:
        """How many rows of a prompt stand together in a micro-batch."""
        return math.gcd(self.unit, rollout.group_size)

    def _batch(self, rollout: Rollout, rows: list[int]) -> Any:
        batch = self.actor.batch(rollout, rows, self._unit(rollout))
        if "counted" not in rollout.columns:
            return batch
        counted = padded([rollout.columns["counted"][row] for row in rows], batch.action_mask.shape[1])
        return replace(batch, completion_mask=batch.completion_mask * counted.to(batch.completion_mask))

    def _penalty(self, rollout: Rollout, mask: Tensor) -> Tensor | None:
        """`(B, T)` what is held against each token for leaving the reference; None without one."""
        if not self.args.beta:
            return None
        if "penalty" in rollout.columns:
            return padded(rollout.columns.pop("penalty"), mask.shape[1])
        kind = OTHER_NAMES.get(self.args.kl_penalty, self.args.kl_penalty)
        return kl_penalty(*(padded(each, mask.shape[1]) for each in (rollout.old, rollout.ref)), kind=kind)

    def _round_figures(self, rollout: Rollout, mask: Tensor, scores: Tensor, rewards: Tensor) -> dict[str, float]:
        """What is logged of a round; moves the weight of the divergence."""
        facts = torch.stack([rollout.total, rollout.lengths, rollout.truncated.float()], 1)
        everyones = self.accelerator.gather(torch.cat([rollout.rewards.float(), facts], 1).to(self.args.device))
        figures = self._figures(everyones[:, :-3], *everyones[:, -3:].unbind(1))
        figures["completions/eos_ratio"] = 1 - figures["completions/clipped_ratio"]
        if self.args.num_generations == 1:
            del figures["frac_reward_zero_std"]  # which is of groups
        width, held = mask.shape[1], torch.nan_to_num(scores)
        apart = torch.zeros(())
        if self.args.beta:
            apart = (padded(rollout.old, width) - padded(rollout.ref, width)).sum()
        own = torch.stack([apart, held.sum(), rewards.sum() - held.sum(), mask.sum(), torch.tensor(len(mask))])
        kl, scored, other, actions, rows = self._everyones(own.double()).tolist()
        figures |= {"objective/scores": scored / rows, "objective/rlhf_reward": (scored + other) / rows}
        if self.args.beta:
            figures |= {
                "kl": kl / max(actions, 1.0),
                "objective/kl": kl / rows,
                "objective/kl_coef": self.kl_control.coefficient,
                "objective/non_score_reward": other / rows,
            }
            self.kl_control.step(kl / rows, int(rows))
        return figures

    def _everyones(self, sums: Tensor) -> Tensor:
        """Sums added over the processes."""
        return self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()

    def before_updates(self, buffer: Buffer) -> None:
        """All is known since the round was finished."""

    # ---- The update ------------------------------------------------------------------------------------------------

    def micro_batch(self, buffer: Buffer, rows: list[int]) -> MicroBatch:
        rollout = buffer.rollout
        batch = self._batch(rollout, rows)
        width = batch.action_mask.shape[1]
        for name, held in (("old", rollout.old), *((name, rollout.columns[name]) for name in KEPT)):
            batch.columns[name] = padded([held[row] for row in rows], width)
        counts = (len(rows), int(batch.action_mask.sum()))
        return MicroBatch(batch, rollout, rows, counts, buffer.born == self.state.global_step)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """This micro-batch's share of the step's mean loss per action, times the number of processes."""
        args, columns, mask = self.args, inputs.batch.columns, inputs.batch.action_mask.bool()
        weights = self.action_weights(mask)
        flat = FlatActions(self.objective, mask, weights, columns["advantages"], columns["old"], None)
        policy, stats = self.policy.action_objective(
            model, inputs.batch, flat.losses, entropy=self._logs_next(), values=True
        )
        old_values, returns = columns["values"][mask], columns["returns"][mask]
        counted = torch.ones_like(returns)
        errors = value_losses(stats.values, old_values, returns, counted, epsilon=args.cliprange_value)
        value = (errors * weights[mask]).sum()
        self._record_update(policy, value, stats, columns, mask)
        loss = policy + args.vf_coef * value
        return (loss, stats.values) if return_outputs else loss

    def _record_update(self, policy: Tensor, value: Tensor, stats: Any, columns: dict, mask: Tensor) -> None:
        old, counted = columns["old"][mask], mask[mask]
        logp, values = stats.logp.detach().float(), stats.values.detach()
        grid = torch.zeros_like(columns["old"]).masked_scatter(mask, logp)
        self._record(grid, columns["old"], columns["advantages"], mask, None)
        found = ppo_metrics(
            logp, old, values, columns["values"][mask], columns["returns"][mask], counted,
            value_epsilon=self.args.cliprange_value,
        )  # fmt: skip
        for name, (total, count) in found.items():
            self.record(name, total, count)
        share = self.step_sums["actions"] / self.args.world_size  # what takes the step's mean apart again
        for name, loss in (("loss/policy", policy), ("loss/value", value)):
            self.record(name, loss.detach() * share, mask.sum())
        if stats.entropy is not None:
            self.record("entropy", stats.entropy.detach().float().sum(), mask.sum())
        self._seen.append(torch.stack([mask.sum(), (old - logp).sum(), capped_exp(logp - old).sum()]).double())

    def update_seen(self) -> tuple[float, float]:
        """Of the step under way, over all processes: the means of old - logp, and of the ratio."""
        actions, apart, ratio = self._everyones(torch.stack(self._seen).sum(0)).tolist()
        return apart / max(actions, 1.0), ratio / max(actions, 1.0)

    def before_step(self) -> None:
        """Called when the gradients are all there: takes them away where the ratios say that the step went wrong."""
        if self.args.ratio_threshold is None or not skips_batch(self.update_seen()[1], self.args.ratio_threshold):
            return
        self._noted["update/skipped"].append(1.0)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def after_step(self) -> None:
        """Called after each step: leaves the rest of the round where the policy has gone too far."""
        if self.args.target_kl is not None and self.buffer is not None and not self.buffer.spent:
            if stops := stops_early(self.update_seen()[0], self.args.target_kl):
                self.buffer.cursor = len(self.buffer.cut) * self.buffer.iterations
            self._noted["update/stopped_early"].append(float(stops))
        self._seen = []

    # ---- Going on --------------------------------------------------------------------------------------------------

    def controllers(self) -> dict[str, Any]:
        return {"kl_coefficient": self.kl_control.coefficient, "moments": asdict(self.moments)}

    def load_controllers(self, state: dict[str, Any]) -> None:
        self.kl_control.coefficient = state["kl_coefficient"]
        self.moments = RunningMoments(**state["moments"])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as its library loads it, without the critic, and the critic in a file beside it."""
        super().save_model(output_dir, _internal_call)
        save_critic(self.model, Path(output_dir or self.args.output_dir), writes=self.args.should_save)

    def load_extras(self, checkpoint: Path) -> None:
        super().load_extras(checkpoint)
        load_critic(self.model, checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        load_critic(self.model, Path(self.state.best_model_checkpoint))


class Watch(TrainerCallback):
    """Tells the trainer when a step is about to be taken, and when it has been."""

    def __init__(self, trainer: ActorCriticTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.before_step()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.after_step()


def actor_critic_objective(args: Any) -> PolicyGradient:
    """The policy's loss by ActorCriticOptions: the clipped ratio of each action, its mean over a step's actions.

    Raises:
        UserError: options out of range.
    """
    check_actor_critic(args)
    return made_objective(args, loss_type="dapo", epsilon=args.epsilon, epsilon_high=args.epsilon_high)


def kl_controller(args: Any) -> KLController:
    """What sets the weight of the divergence, by ActorCriticOptions.

    Raises:
        UserError: numbers out of range.
    """
    if args.adap_kl_ctrl and not args.beta:
        raise UserError("adap_kl_ctrl moves beta, which is 0 and would stay so: give it a value to begin with.")
    try:
        if args.adap_kl_ctrl:
            return AdaptiveKL(args.beta, target=args.target, horizon=args.horizon)
        return FixedKL(args.beta)
    except ValueError as error:  # the objective's own words
        raise UserError(str(error)) from error


def check_actor_critic(args: Any) -> None:
    """Raise UserError for ActorCriticOptions that are out of range, or without effect."""
    for name in ("gamma", "lam"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"{name} {getattr(args, name)}: must be at least 0 and at most 1.")
    for name in ("score_clip", "cliprange_value", "target_kl", "ratio_threshold"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise UserError(f"{name} {value}: must be above 0; none leaves it out.")
    for name in ("vf_coef", "missing_eos_penalty", "value_learning_rate"):
        if (value := getattr(args, name)) is not None and value < 0:
            raise UserError(f"{name} {value}: must be at least 0.")
    if args.dynamic_sampling and args.num_generations < 2:
        raise UserError("dynamic_sampling looks at groups: give num_generations of at least 2, or leave it out.")
    if args.use_score_norm and not args.use_score_scaling:
        raise UserError("use_score_norm is a part of use_score_scaling: give both, or leave it out.")
    kl_controller(args)


def _counted(rollout: Rollout) -> Tensor:
    """`(B, T)` bool, the actions that are learnt from: all that were taken, but for those that a column leaves out."""
    mask = torch.arange(int(rollout.lengths.max()))[None] < rollout.lengths[:, None]
    return mask & padded(rollout.columns["counted"], mask.shape[1]).bool() if "counted" in rollout.columns else mask


def _put(held: list[Tensor | None], rows: list[int], values: Tensor) -> None:
    for row, value in zip(rows, values.float().cpu(), strict=True):
        held[row] = value
