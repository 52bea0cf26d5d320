"""DiffusionNFT: rewards learnt from by the forward process, on noised copies of the pictures that were drawn.

Zheng et al. 2025, arXiv:2509.16117. Of a rollout the clean latents and the rewards are all that is needed, so that any
solver may draw them, and nothing is learnt about the steps that it took. A slowly moving copy of the model draws.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from diffusionalign.denoising import DenoisingTrainer
from diffusionalign.denoising_config import DenoisingConfig
from diffusionalign.nft_options import DiffusionNFTOptions
from diffusionalign.noising import drawn_levels, seeded
from shared.errors import UserError
from shared.objectives.denoising import mean_squared_error, nft_losses, optimality
from shared.trainers.config import AlignConfig
from shared.trainers.reference import Reference, make_reference
from shared.trainers.reference_sync import load_reference, save_reference, sync_reference
from shared.trainers.rollout import Buffer, MicroBatch, Rollout

OLD_ADAPTER, OLD_FILE = "old", "old.safetensors"  # of the model that draws


@dataclass
class DiffusionNFTConfig(DenoisingConfig, DiffusionNFTOptions, AlignConfig):
    """Options of DiffusionNFTTrainer: DiffusionNFTOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "diffusion_nft"
    not_taken: ClassVar[dict[str, str]] = {
        "decay_type": "Give old_decay_start, old_decay_rate and old_decay_max.",
        "adv_clip_max": "It is called advantage_clip.",
        "epsilon": "Leave it out: there is no ratio to be clipped.",
    }

    def _check_options(self) -> None:
        super()._check_options()
        if self.noise_levels is not None and not 1 <= self.noise_levels <= self.num_inference_steps:
            most = self.num_inference_steps
            raise UserError(f"noise_levels {self.noise_levels}: must be at least 1, and at most the {most} steps.")
        for name, least in (("nft_beta", 1e-6), ("beta", 0.0), ("old_decay_rate", 0.0), ("old_decay_start", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)}: must be at least {least:g}.")
        if not 0 <= self.old_decay_max < 1:
            raise UserError(f"old_decay_max {self.old_decay_max}: must be at least 0 and below 1.")


@dataclass
class CleanPictures:
    """R pictures with E draws of noise each; or N pairs of a picture and a draw, as N rows with one.

    Args:
        clean: `(R, C, h, w)`.
        noise: `(R, E, C, h, w)`.
        at: `(R, E)`, the levels of the draws.
        prompts: R.
        columns: `good` `(R,)`; see shared.objectives.denoising.optimality.
    """

    clean: Tensor
    noise: Tensor
    at: Tensor
    prompts: list[str]
    columns: dict[str, Tensor] = field(default_factory=dict)

    @property
    def action_mask(self) -> Tensor:
        """`(R, E)`, ones."""
        return torch.ones_like(self.at)

    def to(self, device: torch.device | str) -> Self:
        """The batch on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("clean", "noise", "at")}
        return replace(self, **moved, columns={name: value.to(device) for name, value in self.columns.items()})

    def parts(self, pairs: int) -> Iterator[Self]:
        """Its R * E pairs, picture by picture, so many at a time."""
        rows, draws = self.at.shape
        picture = torch.arange(rows * draws, device=self.at.device) // draws
        for start in range(0, rows * draws, pairs):
            flat = slice(start, start + pairs)
            own = picture[flat]
            yield replace(
                self,
                clean=self.clean[own],
                noise=self.noise.flatten(0, 1)[flat, None],
                at=self.at.flatten()[flat, None],
                prompts=[self.prompts[row] for row in own.tolist()],
                columns={name: value[own] for name, value in self.columns.items()},
            )


class DiffusionNFTTrainer(DenoisingTrainer):
    """Diffusion negative-aware fine-tuning: good pictures drawn towards, bad ones away from, on the forward process.

    Zheng et al. 2025, arXiv:2509.16117; see shared.objectives.denoising.nft_losses. The model is sampled from and
    trained without guidance. What draws is the model of earlier rounds, moved towards the newest one before each:
    `θ_old ← η θ_old + (1-η) θ` with `η = min(old_decay_rate · steps, old_decay_max)`. For flow matching in the first
    place; pipelines that predict noise or velocity are trained by the same estimate of the clean picture.
    Arguments as DenoisingTrainer.
    """

    config_class = DiffusionNFTConfig
    records = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.adapter.guided and self.args.guidance_scale > 1:
            raise UserError(
                f"guidance_scale {self.args.guidance_scale}: DiffusionNFT draws and trains without guidance. Leave "
                "it out; eval_guidance_scale is for evaluations."
            )
        self.old: Reference = make_reference(
            self.model, accelerator=self.accelerator, policy=self.policy, synced=True, adapter=OLD_ADAPTER
        )

    def objective_of(self, args: Any, numbers: int) -> None:
        """None: no ratio of any step is learnt from."""

    # ---- The model that draws --------------------------------------------------------------------------------------

    def sampling(self) -> contextlib.AbstractContextManager[nn.Module]:
        return self.old.running(self.model)

    def _round(self) -> Rollout:
        if self.state.global_step:
            args = self.args
            steps = max(0, self.state.global_step - args.old_decay_start)
            kept = min(args.old_decay_rate * steps, args.old_decay_max)
            sync_reference(self.model, self.old, alpha=1 - kept)
        return super()._round()

    def save_extras(self, checkpoint: Path) -> None:
        super().save_extras(checkpoint)
        save_reference(self.model, self.old, checkpoint, writes=self.args.should_save, file=OLD_FILE)

    def load_extras(self, checkpoint: Path) -> None:
        super().load_extras(checkpoint)
        load_reference(self.model, self.old, checkpoint, file=OLD_FILE)

    # ---- The update ------------------------------------------------------------------------------------------------

    @property
    def skips_idle(self) -> bool:
        """A picture of no advantage holds the model where it was."""
        return False

    def before_updates(self, buffer: Buffer) -> None:
        """No log-probabilities are needed."""

    def micro_batch(self, buffer: Buffer, rows: list[int]) -> MicroBatch:
        rollout, args, schedule = buffer.rollout, self.args, self.actor.schedule
        clean = rollout.actions.final[rows]
        draws = args.noise_levels or schedule.steps
        first = args.process_index * rollout.rows
        noise, at = [], []
        for row in rows:
            random = seeded("forward", args.seed, self.state.global_step, first + row)
            at.append(drawn_levels(draws, schedule.steps, random=random))
            noise.append(torch.randn(draws, *clean.shape[1:], generator=random))
        good = optimality(rollout.advantages[rows], args.advantage_clip)
        prompts = [rollout.samples[row].prompt for row in rows]
        batch = CleanPictures(clean, torch.stack(noise), torch.stack(at), prompts, {"good": good})
        on_policy = buffer.born == self.state.global_step
        return MicroBatch(batch, rollout, rows, (len(rows), len(rows) * draws), on_policy)

    def with_reference(self, model: nn.Module, batch: CleanPictures, size: int) -> CleanPictures:
        return batch  # it is asked together with the model that draws

    def compute_loss(
        self,
        model: nn.Module,
        inputs: MicroBatch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ):
        """These pairs' share of the step's mean loss, times the number of processes."""
        batch, args, adapter, levels = inputs.batch, self.args, self.adapter, self.actor.schedule
        clean, at = batch.clean.float(), batch.at.flatten()
        noisy = levels.noised(clean, at, batch.noise.flatten(0, 1)).to(adapter.dtype)
        told = adapter.encode_prompts(batch.prompts)

        def predicted(by: nn.Module) -> Tensor:
            return adapter.predict(by, noisy, levels.timesteps[at], told, guidance_scale=args.guidance_scale)

        with self.old.running(model) as old:
            before = predicted(old)
        anchor = None
        if args.beta:
            with self.reference.running(model) as reference:
                anchor = predicted(reference)
        given = predicted(model)
        now, then = (levels.clean(noisy, at, each) for each in (given, before))
        beta, most = args.nft_beta, args.advantage_clip
        losses = nft_losses(now, then, clean, batch.columns["good"], beta=beta, max_advantage=most)
        if anchor is not None:
            distance = mean_squared_error(given, anchor)
            losses = losses + args.beta * distance
            self.record("reference_distance", distance.sum(), len(distance))
        moved = mean_squared_error(given.detach(), before)
        self.record("old_distance", moved.sum(), len(moved))
        loss = losses.sum() * (args.world_size / self.step_sums["actions"])
        return (loss, losses) if return_outputs else loss
