"""Direct preference optimisation of diffusion models on pairs of pictures, with the losses of its family."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from diffusionalign.actor import DenoisingActor
from diffusionalign.denoising_config import COUNTS, check_counts
from diffusionalign.noising import drawn_levels, seeded
from diffusionalign.pipelines.loading import adapter_of, frozen_type, load_pipeline, open_pipeline
from diffusionalign.pipelines.preparing import prepare_denoiser
from diffusionalign.pipelines.saving import DiffusionTrainerMixin
from diffusionalign.preference_batches import PicturePairCollator, PicturePairs
from diffusionalign.preference_latents import with_latents
from diffusionalign.preference_options import DiffusionDPOOptions
from diffusionalign.preference_policy import PairPolicy
from diffusionalign.preference_rows import PairRows, checked_pairs
from diffusionalign.schedules import training_schedule
from shared.builtin import is_builtin
from shared.errors import UserError
from shared.hub import require_available
from shared.rewards.combine import RewardTable
from shared.runtime.report import SampleRow
from shared.trainers.answers import evenly_spaced, first_set
from shared.trainers.config import AlignConfig
from shared.trainers.online_evaluation import answered
from shared.trainers.pictures import Pictures
from shared.trainers.preference import PairedTrainer, paired_objective
from shared.trainers.reference import NoReference, Reference
from shared.trainers.referenced import Referenced
from shared.trainers.rewarding import GIVEN_WITH_IMAGES, refuse_unknown, rewards_of
from shared.trainers.rollout import Rollout

ROUNDING = 2e-7  # of a mean squared error of about 1
SAME_HERE = {"sigmoid_norm": "sigmoid"}  # losses that differ from others by a length, which pictures do not have


@dataclass
class DiffusionDPOConfig(DiffusionDPOOptions, AlignConfig):
    """Options of DiffusionDPOTrainer: DiffusionDPOOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "diffusion_dpo"
    followed: ClassVar[dict[str, tuple]] = {**AlignConfig.followed, "pass_reward": (None,)}
    not_taken: ClassVar[dict[str, str]] = {
        "beta_dpo": "It is called beta.",
        "resolution": "Give height and width.",
        "random_crop": "Leave it out: the middle of each picture is used.",
        "no_hflip": "Leave it out: pictures are not flipped.",
        "ld_alpha": "Leave it out: a picture has no length.",
        "use_weighting": "Leave it out: WPO weighs pairs by the chances of tokens.",
    }

    def __post_init__(self):
        super().__post_init__()
        check_counts(self, ("eval_noise_draws", *COUNTS))
        if not 0 <= self.prompt_dropout < 1:
            raise UserError(f"prompt_dropout {self.prompt_dropout}: must be at least 0 and below 1.")
        for name in self.loss_type:
            if name in SAME_HERE:
                raise UserError(
                    f"loss_type {name}: a picture has no length. Give {SAME_HERE[name]}, which is the same."
                )


class DiffusionDPOTrainer(DiffusionTrainerMixin, Referenced, PairedTrainer):
    """Train a diffusion pipeline's denoiser on pairs of a preferred and another picture, against a reference.

    Wallace et al. 2023, arXiv:2311.12908; for flow matching Liu et al. 2025, arXiv:2501.13918. A pair's two pictures
    get the same noise at the same level; the loss is `-log σ(-½β[(e_w - e_w^ref) - (e_l - e_l^ref)])` with e the mean
    squared error of the prediction, or another one that `args.loss_type` names. Noise and level of a pair depend on
    the seed, the step and the row alone: a run is the same however its steps are cut up and wherever it goes on.

    Args:
        model: a pipeline of diffusers (Stable Diffusion 1, 2, XL, 3, Flux), its hub id, folder or built-in name.
        reward_funcs: rewards that judge pictures drawn from held-out prompts before and after training, never trained
            on; `args.reward_funcs` where None.
        args: options; the defaults where None.
        train_dataset: rows with `prompt`, `chosen` and `rejected`, or Pick-a-Pic's `caption`, `jpg_0`, `jpg_1` and
            `label_0`, whose ties are left out.
        eval_dataset: held-out rows of the same kind, or several sets by name.
        reward_processing_classes: one a reward, or None.
        callbacks, optimizers: as transformers.Trainer.
        peft_config: "lora", another adapter's configuration, the folder of an adapter to go on with, or None: train
            the whole denoiser.
        ref_model: the reference: a denoiser, or the name of a pipeline; `args.ref_model_name_or_path` where None.
            Without either it is the model as it is at the start.

    Raises:
        UserError: a pipeline or options that cannot be had.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.

    Example:
        >>> args = DiffusionDPOConfig(learning_rate=1e-5, beta=5000)  # doctest: +SKIP
        >>> DiffusionDPOTrainer("stable-diffusion-v1-5/stable-diffusion-v1-5", args=args, train_dataset=rows).train()
        ... # doctest: +SKIP
    """

    first_number = drawn_before = 0  # of pictures drawn to learn from: there are none
    batch_class = PicturePairs
    throughput = (None, "images")
    read_held_out = PairRows

    def __init__(
        self,
        model: Any = None,
        reward_funcs: Any = None,
        args: DiffusionDPOConfig | None = None,
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
        args = DiffusionDPOConfig.of(args)
        if args.reference_free and (ref_model is not None or args.ref_model_name_or_path or args.sync_ref_model):
            raise UserError("reference_free: no reference is run, and there is one to be run or moved. Leave one out.")
        objective = self.objective_asked(args)
        self.take_reference(model, ref_model, args, train_dataset=train_dataset, peft_config=peft_config)
        train, held_out = checked_pairs(train_dataset, eval_dataset, args)
        judged = reward_funcs if reward_funcs is not None else args.reward_funcs
        given = {"processing_classes": reward_processing_classes, "beside": GIVEN_WITH_IMAGES}
        self.rewards = rewards_of(judged, args, first_set(held_out) or train, **given) if judged else None
        self.adapter = adapter = open_pipeline(model, args, peft_config, max_sequence_length=args.max_sequence_length)
        adapter.latent_shape(args.height, args.width)
        height, width = args.height or adapter.size[0], args.width or adapter.size[1]
        denoiser = prepare_denoiser(adapter, peft_config, args)
        levels = training_schedule(adapter.pipeline.scheduler).to(args.device)
        self.actor = DenoisingActor(adapter, args)
        super().__init__(
            denoiser,
            args,
            policy=PairPolicy(adapter, levels, told_scale=args.guidance_scale),
            data_collator=PicturePairCollator((height, width), args.on_bad_row),
            train_dataset=train,
            eval_dataset=held_out,
            callbacks=[Pictures(self), *(callbacks or [])],
            optimizers=optimizers,
            ref_model=self.reference_given,
            **objective,
        )
        self.report.units = {"loss": "per pair"}
        self.level = max(self.level, ROUNDING * args.beta)
        if args.precompute_latents:
            self._encode_all()

    def objective_options(self, args: DiffusionDPOConfig) -> dict[str, Any]:
        return {"objective": paired_objective(args)}

    def _encode_all(self) -> None:
        """Put latents beside the rows."""
        rows, args = self.eval_dataset, self.args
        size = args.per_device_train_batch_size
        options = {"accelerator": self.accelerator, "batch_size": size}

        def encoded(rows: Any, what: str) -> Any:
            return with_latents(rows, self.data_collator, self.adapter, what=what, **options)

        self.train_dataset = encoded(self.train_dataset, "train")
        if isinstance(rows, dict):
            self.eval_dataset = {name: encoded(own, name) for name, own in rows.items()}
        elif rows is not None:
            self.eval_dataset = encoded(rows, "eval")

    # ---- The reference ---------------------------------------------------------------------------------------------

    def reference_of(self, ref_model: Any) -> Reference:
        return NoReference() if self.args.reference_free else super().reference_of(ref_model)

    @staticmethod
    def check_reference_is_there(name: str, args: DiffusionDPOConfig) -> None:
        if not is_builtin(name):
            require_available(name, file="model_index.json", what="pipeline")

    def load_reference(self, name: str, **options: Any) -> nn.Module:
        """The denoiser of a pipeline, in the type of weights that are not trained."""
        denoiser = adapter_of(load_pipeline(name, dtype=frozen_type(self.args))).denoiser
        self.fit_reference(denoiser)
        return denoiser

    def fit_reference(self, ref_model: str | nn.Module | None) -> None:
        kind, own = type(ref_model).__name__, type(self.adapter.denoiser).__name__
        if isinstance(ref_model, nn.Module) and kind != own:
            raise UserError(f"The reference is a {kind}, the model's denoiser a {own}: give a denoiser of that kind.")

    # ---- Batches ---------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: PicturePairs) -> PicturePairs:
        batch = super()._prepare_inputs(inputs)
        args, training = self.args, self.model.training
        if batch.latents is None:
            images = batch.pixels.float() / 255
            latents = self.adapter.encode_images(images, sample=False, slice_size=args.vae_slice)
            batch = replace(batch, latents=latents.to(self.adapter.dtype), pixels=None)
        # of the seed and the row, in training of the step too, so that they are nobody's else
        when = self.state.global_step if training else "held out"
        noise, at, prompts = [], [], []
        draws = 1 if training else args.eval_noise_draws
        shape, levels = batch.latents.shape[1:], self.policy.levels
        for prompt, row in zip(batch.prompts, batch.columns["row"].tolist(), strict=True):
            random = seeded(args.seed, when, row)
            middle = args.timestep_sampling == "logit_normal"
            at.append(drawn_levels(draws, levels.steps, random=random, middle=middle))
            noise.append(torch.randn(draws, *shape, generator=random))
            dropped = training and torch.rand((), generator=random) < args.prompt_dropout
            prompts.append(None if dropped else prompt)
        told = self.adapter.encode_prompts(prompts)
        told = {name: value.repeat_interleave(2, 0) for name, value in told.items()}
        told["time_ids"] = self._size_ids(batch)
        noise, at = (torch.stack(each).to(args.device) for each in (noise, at))
        return replace(batch, conditioning=told, noise=noise, at=at)

    def _size_ids(self, batch: PicturePairs) -> Tensor:
        """What SDXL is told of each picture; other denoisers do not look."""
        height, width = self.data_collator.size
        cut = torch.tensor([[height, width]], device=batch.sizes.device).expand(len(batch.sizes), -1)
        return torch.cat([batch.sizes, cut], 1)

    # ---- Pictures --------------------------------------------------------------------------------------------------

    def score(self, rollout: Rollout, mode: str = "eval") -> RewardTable:
        """The rewards of drawn pictures; see shared.trainers.online.OnlineTrainer.score."""
        return self.rewards(rollout.samples, trainer_state=self.state, group_size=rollout.group_size, mode=mode)

    def judged(self) -> tuple[dict[str, float], list[SampleRow]]:
        """Rewards of pictures drawn from evenly spaced held-out prompts, by the same noise each time."""
        rows = evenly_spaced(self.eval_dataset, self.args.eval_answers)
        if self.rewards is None or rows is None:
            return {}, []
        with self.accelerator.autocast():
            self.actor.refresh(self)
            return answered(self, rows)
