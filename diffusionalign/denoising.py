"""DenoisingTrainer: policy gradients whose actions are denoising steps, on the core of every online trainer.

DDPO and Flow-GRPO are its options. A micro-batch is some pictures with their recorded steps; it is trained on so many
pairs of a picture and a step at a time, which bounds memory and leaves the gradient as it is. Which steps are actions
is chosen in windows.py, how they are sampled and kept in actor.py.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn
from transformers import TrainerCallback

from diffusionalign.actor import DenoisingActor
from diffusionalign.diversity import Diversity, thumbnails
from diffusionalign.pipelines.loading import load_pipeline, open_pipeline
from diffusionalign.pipelines.preparing import prepare_denoiser
from diffusionalign.pipelines.saving import DiffusionTrainerMixin
from diffusionalign.policy import DenoisingBatch, DenoisingPolicy, StepStats
from diffusionalign.prompts import checked_prompts
from shared.errors import UserError
from shared.objectives.advantages import group_advantages, weighted_rewards
from shared.objectives.policy_gradient import PolicyGradient
from shared.objectives.policy_losses import capped_exp
from shared.trainers.policy_gradient import PolicyGradientTrainer, made_objective
from shared.trainers.prompt_statistics import PromptStatistics
from shared.trainers.reference import Reference, make_reference
from shared.trainers.rewarding import GIVEN_WITH_IMAGES, check_best_metric, refuse_unknown, rewards_of
from shared.trainers.rollout import Buffer, MicroBatch, Rollout, padded

PAPERS = 4 * 64 * 64  # numbers of the latents that DDPO's clip range goes with
LOOK_EVERY = 20  # steps between two second looks at the ratio of a round's first step
SHOWN = 64  # pictures of a round, over all processes, that diversity is measured on


class DenoisingTrainer(DiffusionTrainerMixin, PolicyGradientTrainer):
    """Base of the trainers that are rewarded for pictures and learn from the steps that drew them.

    Args:
        model: a diffusers pipeline, or its hub id, folder or built-in name.
        reward_funcs: one reward or several: functions `f(images, prompts, **columns) -> numbers`, built-in names,
            dotted paths, see shared.rewards.loading; `args.reward_funcs` where None.
        args: options; the defaults where None.
        train_dataset: prompts: a list of texts, a text file, rows with `prompt`, or a function that gives them.
        eval_dataset: held-out prompts, or several sets by name.
        reward_processing_classes: processors of reward models that are given as such, one a reward.
        callbacks, optimizers: as transformers.Trainer.
        peft_config: the adapter; "lora" for the usual one, a folder or hub id to go on with that one, None to train
            the whole denoiser.
        ref_model: a pipeline or its name, whose denoiser β holds the policy near to; None: the model without its
            adapter, or as it is at the start.

    Raises:
        UserError: options that cannot be followed, before anything is sampled; rewards that are not known.
        DataError: prompts that cannot be used.
    """

    config_class: ClassVar[type]
    records: ClassVar[bool] = True  # whether single steps are learnt from

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = "lora",
        *,
        ref_model: Any = None,
        **unknown: Any,
    ):
        refuse_unknown(type(self).__name__, unknown)
        if model is None:
            raise UserError("model is missing: give a diffusers pipeline, or its hub id, folder or built-in name.")
        args = self.config_class.of(args)
        if ref_model is not None and not args.beta:
            raise UserError("ref_model: there is no reference where beta is 0. Give beta, or leave this out.")
        train, held_out = checked_prompts(train_dataset, eval_dataset, args)
        classes = reward_processing_classes
        rewards = rewards_of(reward_funcs, args, train, processing_classes=classes, beside=GIVEN_WITH_IMAGES)
        check_best_metric(self, args, rewards.names, held_out, unit=DenoisingActor.unit)
        self.adapter = open_pipeline(model, args, peft_config, max_sequence_length=args.max_sequence_length)
        DenoisingActor(self.adapter, args, records=self.records)  # its errors come before weights are changed or moved
        denoiser = prepare_denoiser(self.adapter, peft_config, args)
        actor = DenoisingActor(self.adapter, args, records=self.records)
        self.diversity, self.reward_queries = Diversity(), 0
        self.statistics = PromptStatistics(args.prompt_buffer_size, args.prompt_min_count)
        self._first_pair = 0  # of the part that is trained on, in its micro-batch
        self._looked: int | None = None  # the step in which the ratio was last looked at twice
        super().__init__(
            denoiser,
            args,
            policy=DenoisingPolicy(
                self.adapter,
                actor.schedule,
                actor.sampler,
                guidance_scale=args.guidance_scale,
                pairs_at_once=self._pairs(args),
            ),
            actor=actor,
            rewards=rewards,
            objective=self.objective_of(args, math.prod(actor.shape)),
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=callbacks,
            optimizers=optimizers,
            ref_model=ref_model,
        )

    @staticmethod
    def _pairs(args: Any) -> int:
        return args.pairs_at_once or args.per_device_train_batch_size

    def objective_of(self, args: Any, numbers: int) -> PolicyGradient:
        """The clipped ratio of single steps; the divergence is added by the policy, exactly.

        Args:
            numbers: of a picture's latents.
        """
        scale = math.sqrt(PAPERS / numbers) if args.scale_epsilon else 1.0
        high = None if args.epsilon_high is None else args.epsilon_high * scale
        return made_objective(args, loss_type="dapo", epsilon=args.epsilon * scale, epsilon_high=high)

    def reference_of(self, ref_model: Any) -> Reference:
        """The denoiser with its adapter off, or a frozen one: a copy, or that of a given pipeline."""
        if ref_model is not None:
            own = {"dtype": self.adapter.dtype} if isinstance(ref_model, str) else {}
            pipeline = load_pipeline(ref_model, **own) if isinstance(ref_model, str) else ref_model
            if type(pipeline) is not type(self.adapter.pipeline):
                raise UserError(
                    f"ref_model is a {type(pipeline).__name__}, the model a {type(self.adapter.pipeline).__name__}: "
                    "give one of the same kind."
                )
            ref_model = getattr(pipeline, self.adapter.denoiser_name)
        return make_reference(self.model, ref_model, accelerator=self.accelerator, policy=self.policy)

    # ---- What the rewards mean -------------------------------------------------------------------------------------

    def advantages(self, rewards_BK: Tensor, penalty_B: Tensor) -> Tensor:
        """By `args.advantages`, held within `args.advantage_clip`."""
        args = self.args
        total = weighted_rewards(rewards_BK, self.rewards.weights.to(rewards_BK.device)) - penalty_B
        if args.advantages == "group":
            found = super().advantages(rewards_BK, penalty_B)
        elif args.advantages == "prompt":
            found = self.statistics.advantages(self._prompts, total)
        else:
            found = group_advantages(total.double(), len(total), eps=1e-8).float()
        return found if args.advantage_clip is None else found.clamp(-args.advantage_clip, args.advantage_clip)

    def sampled(self, indices: list[int], group_size: int | None = None) -> Rollout:
        rollout = super().sampled(indices, group_size)
        self.reward_queries += rollout.rows * self.args.world_size
        return rollout

    def finish_round(self, rollout: Rollout) -> dict[str, float]:
        if self.drawn_before == 0:
            self._check_applies(rollout)
        own = [sample.prompt for sample in rollout.samples]
        self._prompts = gather_object(own) if self.args.world_size > 1 else own
        small = thumbnails([sample.output for sample in rollout.samples[: max(2, SHOWN // self.args.world_size)]])
        diversity = self.diversity(self.accelerator.gather(small.to(self.args.device)).cpu())
        figures = super().finish_round(rollout) | {"reward_queries": float(self.reward_queries)}
        return figures if math.isnan(diversity) else figures | {"sample_diversity": diversity}

    def _check_applies(self, rollout: Rollout) -> None:
        """Raise UserError where no picture of the first round has a reward: nothing would ever be learnt."""
        judged = (~rollout.total.isnan()).sum().to(self.args.device)
        if int(self.accelerator.reduce(judged, "sum")) == 0:
            raise UserError(
                f"No reward applies to any of the first {rollout.rows * self.args.world_size} pictures: "
                f"{', '.join(self.rewards.names)} gave NaN or None for all of them. A reward gives a finite number "
                "for each picture that it can judge."
            )

    def controllers(self) -> dict[str, Any]:
        return {
            **super().controllers(),
            "prompts": self.statistics.state(),
            "diversity": list(self.diversity.start),
            "reward_queries": self.reward_queries,
        }

    def load_controllers(self, state: dict[str, Any]) -> None:
        super().load_controllers(state)
        self.statistics.load_state(state["prompts"])
        self.diversity.start, self.reward_queries = list(state["diversity"]), state["reward_queries"]

    # ---- The update ------------------------------------------------------------------------------------------------

    @property
    def skips_idle(self) -> bool:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # where all run the model equally often
        return not self.args.beta and not sharded

    def fill(self, rollout: Rollout, name: str, parts: list[list[int]]) -> None:
        """As PolicyGradientTrainer, in the batches of the update: half precision gives other batches other numbers."""
        super().fill(rollout, name, [self.kept(rollout, rows)[0] for rows in parts])

    def micro_batch(self, buffer: Buffer, rows: list[int]) -> MicroBatch:
        micro = super().micro_batch(buffer, rows)
        if self.records and micro.on_policy and "old" not in micro.batch.columns:
            sampled = [micro.rollout.logp[row] for row in micro.rows]
            micro.batch.columns["sampled"] = padded(sampled, micro.batch.at.shape[1])
        return micro

    def training_step(self, model: nn.Module, inputs: MicroBatch, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Forward and backward of a micro-batch, `pairs_at_once` at a time; gradients are exchanged after the last."""
        inputs = self._prepare_inputs(inputs)
        size = self._pairs(self.args)
        parts = list(self.with_reference(model, inputs.batch, size).parts(size))
        total = torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts):
            self._first_pair = number * size
            with self._exchange(model, last=number == len(parts) - 1):
                total = total + super().training_step(model, replace(inputs, batch=part), num_items_in_batch)
        return total

    def with_reference(self, model: nn.Module, batch: DenoisingBatch, size: int) -> DenoisingBatch:
        """The batch with what the reference says of it, where there is one; `size` pairs are run at a time."""
        if not self.args.beta:
            return batch
        with self.reference.running(model) as referred, self.compute_loss_context_manager():
            means = [self.policy.steps(referred, part).mean for part in batch.parts(size)]
        return replace(batch, reference=torch.cat(means).view(*batch.after.shape))

    @contextlib.contextmanager
    def _exchange(self, model: nn.Module, *, last: bool):
        """Gradients are exchanged in the last part alone, and there only if transformers would now."""
        if last:
            yield
            return
        state = self.accelerator.gradient_state
        before = state.sync_gradients
        state._set_sync_gradients(False)  # DeepSpeed steps within its backward pass
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        try:
            with contextlib.nullcontext() if deepspeed else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(before)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        self._again = None
        step = self.state.global_step
        if inputs.on_policy and (self._looked is None or step >= self._looked + LOOK_EVERY):
            self._looked = step
            with torch.no_grad():
                self._again = self.policy.steps(model, inputs.batch).logp
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def beside(self, batch: DenoisingBatch, weights: Tensor) -> dict[str, Any]:
        if batch.reference is None:
            return {}
        return {"reference": batch.reference.flatten(0, 1), "kl_weights": self.args.beta * weights.flatten()}

    def look_at(self, inputs: MicroBatch, stats: StepStats) -> None:
        mask = inputs.batch.action_mask.flatten().bool()
        if stats.kl is not None:
            self.record("kl", stats.kl.sum(), len(stats.kl))
        if self._again is not None:
            self.record("ratio/first_step_error", _ratio_error(stats.logp, self._again[mask]).max(), 1)
        if (sampled := inputs.batch.columns.get("sampled")) is not None:
            sampled = sampled.flatten()[mask]
            self.record("sampling/logp_difference", (stats.logp - sampled).abs().sum(), len(sampled))
            beyond = _ratio_error(stats.logp, sampled) > self.objective.epsilon
            self.record("sampling/ratio_beyond_clip", beyond.sum(), len(sampled))

    def _remember(self, inputs: MicroBatch, logp: Tensor) -> None:
        if not inputs.on_policy or self.args.num_iterations == 1 or self.samplers_count:
            return
        rollout, count = inputs.rollout, int(inputs.rollout.lengths[0])
        for pair, value in enumerate(logp.flatten().tolist(), start=self._first_pair):
            row, place = inputs.rows[pair // count], pair % count
            if rollout.old[row] is None:
                rollout.old[row] = torch.zeros(count)
            rollout.old[row][place] = value


def _ratio_error(logp: Tensor, other: Tensor) -> Tensor:
    """|ratio - 1|."""
    return (capped_exp(logp - other) - 1).abs()
