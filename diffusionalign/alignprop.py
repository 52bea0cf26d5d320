"""AlignProp: the gradient of a differentiable reward goes back through the denoising steps into the denoiser.

There is no buffer: what is trained on is sampled in the update, with the gradient of the last steps; how far back is
in alignprop_chain.py. Prompts, noise and the first step with a gradient follow from the seed and from how far the run
is, so that a resumed run, more processes or smaller micro-batches draw the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from diffusionalign.actor import TRAINING, DenoisingActor
from diffusionalign.alignprop_chain import Chain, Truncation
from diffusionalign.alignprop_options import AlignPropOptions
from diffusionalign.denoising_config import NOT_TAKEN, check_counts
from diffusionalign.diversity import Diversity, thumbnails
from diffusionalign.pipelines.base import Conditioning
from diffusionalign.pipelines.loading import open_pipeline
from diffusionalign.pipelines.preparing import prepare_denoiser
from diffusionalign.pipelines.saving import DiffusionTrainerMixin
from diffusionalign.prompts import checked_prompts
from diffusionalign.sampling import normal
from shared.errors import UserError
from shared.rewards.base import Sample
from shared.rewards.differentiable import DifferentiableRewards
from shared.trainers.config import AlignConfig
from shared.trainers.online import OnlineTrainer
from shared.trainers.online_config import OnlineConfig
from shared.trainers.online_evaluation import keep_samples
from shared.trainers.rewarding import GIVEN_WITH_IMAGES, check_best_metric, refuse_unknown, rewards_of
from shared.trainers.rollout import Buffer, MicroBatch, Rollout, row_number

PROBES = 4  # prompts whose rewards are tried before anything is sampled
# what other libraries' configurations of policy gradients take, and none of a trainer like this one
OF_POLICIES = (
    "train_clip_range", "train_adv_clip_max", "train_num_inner_epochs", "per_prompt_stat_tracking",
    "per_prompt_stat_tracking_buffer_size", "per_prompt_stat_tracking_min_count", "sample_num_batches_per_epoch",
    "sde_window_size", "sde_window_range", "global_std",
)  # fmt: skip
# option -> the ways that it is for; not the timestep, which the built-in run gives whatever way is asked for
READ_BY = {
    "truncated_backprop_std": ("gaussian",),
    "truncated_rand_backprop_minmax": ("uniform", "refl"),
}
ONCE = "Leave it out: images are made in the update, and trained on once."


@dataclass
class AlignPropConfig(OnlineConfig, AlignPropOptions, AlignConfig):
    """Options of AlignPropTrainer: AlignPropOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "alignprop"
    least_generations: ClassVar[int] = 1  # no rewards are compared
    followed: ClassVar[dict[str, tuple]] = {
        **OnlineConfig.followed,
        "num_iterations": (1,),
        "dynamic_sampling": (False,),
        "async_reward_computation": (False,),
    }
    not_taken: ClassVar[dict[str, str]] = {
        **{name: hint for name, hint in NOT_TAKEN.items() if name not in OF_POLICIES},
        "train_batch_size": "It is called per_device_train_batch_size.",
        "log_image_freq": "It is called sample_every.",
        "truncated_backprop_rand": "Give backprop_strategy: uniform, or fixed for a step that is not drawn.",
        "truncated_backprop": "Give backprop_strategy: full for a gradient through all steps.",
        "backprop_kwargs": "Give truncated_backprop_timestep and _std, or truncated_rand_backprop_minmax.",
    }

    def __post_init__(self):
        super().__post_init__()
        if self.steps_per_generation != self.gradient_accumulation_steps:
            raise UserError(f"steps_per_generation {self.steps_per_generation}: {ONCE}")
        check_counts(self)
        for name in ("beta", "draft_lv_noises", "truncated_backprop_std"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise UserError(f"{name} {value}: must be at least 0.")
        for name, strategies in READ_BY.items():
            if getattr(self, name) is not None and self.backprop_strategy not in strategies:
                raise UserError(
                    f"{name} is of backprop_strategy {' or '.join(strategies)}, and {self.backprop_strategy} does not "
                    "read it: give such a strategy, or leave it out."
                )
        Truncation.of(self)


@dataclass
class Drawn:
    """Images of a micro-batch that are to be made.

    Args:
        samples: their prompts and the rows' other columns; no output yet.
        numbers: of each in the run; its noise follows from it.
    """

    samples: list[Sample]
    numbers: list[int]

    def to(self, device: torch.device | str) -> Self:
        """Itself: noise is drawn where it is used."""
        return self


class AlignPropTrainer(DiffusionTrainerMixin, OnlineTrainer):
    """Reward back-propagation through the sampling chain (AlignProp, DRaFT, ReFL).

    Prabhudesai et al. 2023, arXiv:2310.03739; Clark et al. 2023, arXiv:2309.17400; Xu et al. 2023, arXiv:2304.05977.
    The loss is minus the reward of the images, which are handed to the rewards unclamped, so that pixels at black or
    white keep their gradient.

    Args:
        model: a diffusers pipeline, or its hub id, folder or built-in name.
        reward_funcs: differentiable rewards of images, one or several: functions `f(images, prompts, **columns)` of a
            tensor `(N, 3, H, W)`, or names; those of `args` where None. NaN where one does not apply.
        args: options; the defaults where None.
        train_dataset: prompts: a list of texts, a text file, rows with `prompt`, or a function that gives them.
        eval_dataset: held-out prompts, or several sets by name.
        reward_processing_classes: processors of reward models that are given as such, one a reward.
        callbacks, optimizers: as transformers.Trainer.
        peft_config: the adapter; "lora" for the usual one, a folder or hub id to go on with that one, None to train
            the whole denoiser.

    Raises:
        UserError: options that cannot be followed; a reward that is unknown, not differentiable, or that gives a wrong
            number of values, before anything is sampled.
        DataError: prompts that cannot be used.
    """

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: AlignPropConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = "lora",
        **unknown: Any,
    ):
        refuse_unknown(type(self).__name__, unknown)
        args = AlignPropConfig.of(args)
        if args.beta and peft_config is None:
            raise UserError(
                "beta holds the model near to itself without its adapter: give peft_config, or leave it out."
            )
        train, held_out = checked_prompts(train_dataset, eval_dataset, args)
        rewards = rewards_of(
            reward_funcs, args, train, processing_classes=reward_processing_classes, beside=GIVEN_WITH_IMAGES
        )
        check_best_metric(self, args, rewards.names, held_out, unit="step")
        self.truncation, self.diversity, self.reward_queries = Truncation.of(args), Diversity(), 0
        self.differentiable = DifferentiableRewards(rewards)
        self.adapter = adapter = open_pipeline(model, args, peft_config, max_sequence_length=args.max_sequence_length)
        self._probe(adapter, args, train)
        denoiser = prepare_denoiser(adapter, peft_config, args)
        actor = DenoisingActor(adapter, args)
        self.chain = Chain(adapter, actor.schedule, actor.sampler, args.guidance_scale, args.checkpoint_steps)
        super().__init__(
            denoiser,
            args,
            policy=None,
            actor=actor,
            rewards=rewards,
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    def _probe(self, adapter: Any, args: Any, rows: Any) -> None:
        """See that the rewards of an image of noise, for the first prompts, have a gradient to it."""
        factor = adapter.pipeline.vae_scale_factor
        height, width = (side * factor for side in adapter.latent_shape(args.height, args.width)[1:])
        first = [_sample(row) for row in islice(iter(rows), PROBES)]
        images = torch.rand(len(first), 3, height, width, generator=torch.Generator().manual_seed(0))
        self.differentiable.check(
            images.to(args.device),
            [sample.prompt for sample in first],
            [sample.columns for sample in first],
            trainer_state=None,
            mode="train",
        )

    # ---- A round: prompts, and the numbers of their noise ----------------------------------------------------------

    def _round(self) -> Rollout:
        args, size = self.args, self.args.num_generations
        self.drawn_before = self.prompts.cursor
        drawn = self.prompts.draw(self.local_rows * args.world_size // size)
        first = args.process_index * self.local_rows
        self.first_number = self.drawn_before * size + first
        rows = self.prompts.at([drawn[at // size] for at in range(first, first + self.local_rows)])
        self.row_notes.update(self.prompts.notes)
        count = len(rows)
        return Rollout(
            samples=[_sample(row) for row in rows],
            group_size=self.together,
            actions=[self.first_number + at for at in range(count)],
            lengths=torch.full((count,), args.num_inference_steps),
            truncated=torch.zeros(count, dtype=torch.bool),
            rewards=torch.full((count, len(self.rewards.names)), torch.nan),
            total=torch.full((count,), torch.nan),
        )

    def micro_batch(self, buffer: Buffer, rows: list[int]) -> MicroBatch:
        rollout = buffer.rollout
        drawn = Drawn([rollout.samples[row] for row in rows], [rollout.actions[row] for row in rows])
        return MicroBatch(drawn, rollout, rows, (len(rows), int(rollout.lengths[rows].sum())), True)

    def prepare_step(self, batches: list[MicroBatch]) -> None:
        """Draw from where the gradient flows: once for all images of the step, and alike on all processes."""
        random = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        self.first_step = self.truncation.draw(random)
        self._noted["backprop/first_step"].append(self.first_step)
        self._left, self._thumbnails = len(batches), []

    # ---- The update ------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """This micro-batch's share of the step's loss, times the number of processes."""
        args, samples = self.args, inputs.batch.samples
        latents, positive, random = self._sampled_with_gradient(model, inputs.batch)
        images = self.adapter.decode(latents, slice_size=args.vae_slice)
        copies = len(images) // len(samples)
        total, parts = self.differentiable(images, samples * copies, trainer_state=self.state, mode="train")
        judged = self._judged(images, parts, samples)
        images.register_hook(lambda gradient: self._settled(gradient, judged, samples))
        losses = -total if args.reward_threshold is None else (args.reward_threshold - total).relu()
        # images that nothing is learnt from stay in the loss: every process has its backward pass
        loss = losses.masked_fill(~judged, 0).sum() / copies + 0 * images[judged].sum()
        if args.beta:
            drift = self._drift(model, latents[: len(samples)].detach(), positive, random)
            self.record("drift", drift.sum(), len(drift))
            loss = loss + args.beta * drift.sum()
        self._remember(
            inputs, images[: len(samples)].detach(), parts.detach(), total.detach().where(judged, torch.nan)
        )
        loss = loss * args.world_size / self.step_sums["rows"]
        return (loss, images) if return_outputs else loss

    def _sampled_with_gradient(
        self, model: nn.Module, drawn: Drawn
    ) -> tuple[Tensor, Conditioning, list[torch.Generator]]:
        """Clean latents `(N, C, h, w)`, by DRaFT-LV several times N; what the prompts became; the sources of noise."""
        args, actor, chain = self.args, self.actor, self.chain
        random = [actor.noise(TRAINING, number) for number in drawn.numbers]
        noise = normal(torch.empty(len(random), *actor.shape, device=args.device), random)
        rows = [{**sample.columns, "prompt": sample.prompt} for sample in drawn.samples]
        positive, negative = actor.conditioning(rows, guidance_scale=chain.guidance_scale)
        told = {"positive": positive, "negative": negative}
        if args.backprop_strategy == "draft_lv":
            latents = chain.low_variance(model, noise, args.draft_lv_noises, random, **told)
        elif args.backprop_strategy == "refl":
            latents = chain.one_step(model, noise, self.first_step, random, **told)
        else:
            latents = chain.truncated(model, noise, self.first_step, random, **told)
        return latents, positive, random

    def _drift(self, model: nn.Module, clean: Tensor, positive: Conditioning, random: list[torch.Generator]) -> Tensor:
        """`(N,)` mean squared difference to what is predicted without the adapter, at a random level of each image."""
        adapter, schedule = self.adapter, self.chain.schedule
        levels = [torch.randint(schedule.steps, (), generator=each, device=each.device) for each in random]
        at = torch.stack(levels).to(clean.device)
        noised = schedule.noised(clean, at, normal(clean, random))
        given = (noised, schedule.timesteps[at], positive)
        guidance = {"guidance_scale": 1.0 if adapter.guided else self.chain.guidance_scale}
        with torch.no_grad(), self.model.disable_adapter():
            reference = adapter.predict(self.model, *given, **guidance)
        return (adapter.predict(model, *given, **guidance) - reference).square().mean((1, 2, 3))

    def _judged(self, images: Tensor, parts: Tensor, samples: list[Sample]) -> Tensor:
        """`(N,)` bool, the images that a reward applies to; of the others nothing is learnt.

        Raises:
            UserError: an image has broken down.
        """
        whole = images.detach().flatten(1).isfinite().all(1)
        if not bool(whole.all()):
            raise UserError(_broken("An image", whole, samples, "Lower the learning rate, or train in another type."))
        judged = ~parts.detach()[:, self.rewards.weights.to(parts.device) != 0].isnan().all(1)
        for at in (~judged).nonzero().flatten().tolist():
            row = row_number(samples[at % len(samples)])
            self.row_notes.setdefault(row, "no reward applies to an image of its prompt")
        return judged

    def _settled(self, gradient: Tensor, judged: Tensor, samples: list[Sample]) -> Tensor:
        """The gradient that goes back into the images, without that of images that it is not finite for.

        Raises:
            UserError: there is one that a reward applies to, and on_reward_error is `raise`.
        """
        whole = gradient.flatten(1).isfinite().all(1)
        if self.accelerator.scaler is None:  # else it is multiplied until it is infinite, and then by less
            if self.args.on_reward_error == "raise" and not bool((whole | ~judged).all()):
                what = "The gradient of the reward of an image"
                how = "Mend the reward, or give on_reward_error: skip leaves such images out."
                raise UserError(_broken(what, whole | ~judged, samples, how))
            judged = judged & whole
        return gradient.masked_fill(~judged[:, None, None, None], 0)

    # ---- Figures ---------------------------------------------------------------------------------------------------

    def _remember(self, inputs: MicroBatch, images: Tensor, parts: Tensor, total: Tensor) -> None:
        """Put what became of a micro-batch into its rollout; after the step's last one, note the figures."""
        rollout, own = inputs.rollout, inputs.rows
        self.reward_queries += len(total) * self.args.world_size
        rollout.rewards[own], rollout.total[own] = parts[: len(own)].float().cpu(), total[: len(own)].float().cpu()
        self._thumbnails.append(thumbnails(images))
        shown = self.args.num_completions_to_print
        for row, image in zip(own, images, strict=True):
            if shown is None or row < shown:
                output = image.float().clamp(0, 1).cpu()
                rollout.samples[row] = replace(rollout.samples[row], output=output)
        self._left -= 1
        if self._left == 0:
            self._note(rollout)
            keep_samples(self, rollout)

    def _note(self, rollout: Rollout) -> None:
        own = torch.cat([rollout.rewards, rollout.total[:, None]], 1).to(self.args.device)
        values = self.accelerator.gather(own)
        for name, given in zip([*(f"rewards/{n}" for n in self.rewards.names), ""], values.unbind(1), strict=True):
            given = given[given.isfinite()]
            if len(given):
                self._noted[f"{name}/mean" if name else "reward"].append(float(given.mean()))
            if len(given) > 1:
                self._noted[f"{name}/std" if name else "reward_std"].append(float(given.std()))
        diversity = self.diversity(self.accelerator.gather(torch.cat(self._thumbnails)))
        if not math.isnan(diversity):
            self._noted["sample_diversity"].append(diversity)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "reward_queries": self.reward_queries} if "loss" in logs else logs, start_time)

    def controllers(self) -> dict[str, Any]:
        return {"queries": self.reward_queries, "diversity": list(self.diversity.start)}

    def load_controllers(self, state: dict[str, Any]) -> None:
        self.reward_queries, self.diversity.start = state["queries"], list(state["diversity"])


def _sample(row: Mapping[str, Any]) -> Sample:
    """A row whose image is still to be made."""
    return Sample(row["prompt"], None, {name: value for name, value in row.items() if name != "prompt"})


def _broken(what: str, whole: Tensor, samples: list[Sample], how: str) -> str:
    """What to say of the first image that is not whole."""
    prompt = samples[int((~whole).nonzero()[0]) % len(samples)].prompt
    return f"{what} for the prompt {prompt[:80]!r} is not finite. {how}"
