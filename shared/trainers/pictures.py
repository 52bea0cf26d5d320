"""Pictures of the same prompts from the same noise, sampled before, during and after training.

They go to the run report and to trackers. Nothing is learnt from them, and no random number of the training is drawn.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from shared.data.rows import Rows
from shared.objectives.advantages import weighted_rewards
from shared.policies.prefix import evaluating
from shared.runtime.checkpoint import step_of
from shared.runtime.fsdp import reshard
from shared.runtime.report_text import format_number
from shared.trainers.answers import evenly_spaced, first_set, in_shares
from shared.trainers.keeping import preserved_randomness
from shared.trainers.online_evaluation import drawn, most_likely
from shared.trainers.trackers import hand_over, without_model_config

if TYPE_CHECKING:
    from PIL.Image import Image

    from shared.trainers.base import AlignTrainer

PROMPTS = 6  # of held-out rows, or of training rows where there are none


class Pictures(TrainerCallback):
    """Samples the pictures at the start, every `args.sample_every` steps and at the end; 0: never.

    All processes sample, each its share, since an engine may have the model in pieces on them.

    Args:
        trainer: has an `actor` that makes images. Where it has `rewards` too, they score what is sampled.
    """

    def __init__(self, trainer: AlignTrainer):
        self.trainer = trainer
        self._newest = -1

    def on_init_end(self, args, state, control, **kwargs):
        without_model_config(self.trainer)

    def on_train_begin(self, args, state, control, **kwargs):
        self._newest = -1
        if args.sample_every and state.global_step == 0:
            self._sample()

    def on_step_end(self, args, state, control, **kwargs):
        every = args.sample_every
        if every and (state.global_step % every == 0 or state.global_step >= state.max_steps):
            self._sample()

    def on_train_end(self, args, state, control, **kwargs):
        if not args.sample_every or self.trainer._agreed_signal():
            return
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        kept = state.global_step if best is None else step_of(Path(best))
        if kept != state.global_step:
            self._sample(f"kept: step {kept:,}")
        elif self._newest != state.global_step:
            self._sample()

    def _sample(self, label: str = "") -> None:
        """Sample and show; `label` is of the column, in the place of its step."""
        trainer, started = self.trainer, time.perf_counter()
        rows = self._rows()
        if rows is None:
            return
        with preserved_randomness(), evaluating(trainer.model), trainer.accelerator.autocast():
            prompts, images, rewards = _sampled(trainer, rows)
            reshard(trainer.model)
        step = self._newest = trainer.state.global_step
        if trainer.args.should_save:
            trainer.report.add_pictures(step, prompts, images, rewards, label)
            trainer._write_report("running")
        if not label:  # trackers take a step once
            captions = [
                prompt if reward is None else f"{prompt} ({format_number(reward)})"
                for prompt, reward in zip(prompts, rewards or [None] * len(prompts), strict=True)
            ]
            hand_over(trainer, "pictures", images, captions)
        trainer._totals["answer_seconds"] += time.perf_counter() - started

    def _rows(self) -> Rows | None:
        trainer = self.trainer
        held_out = first_set(trainer.eval_dataset)
        return evenly_spaced(trainer.train_dataset if held_out is None else held_out, PROMPTS)


def _sampled(trainer: Any, rows: Rows) -> tuple[list[str], list[Image], Sequence[float | None] | None]:
    """Prompts, their pictures, and their rewards, all of them together; None: the trainer has none."""
    if getattr(trainer, "rewards", None) is None:
        found = in_shares(rows, trainer.args, lambda batch: _unscored(trainer, batch))
        return [trainer.actor.question(rows[at])[1] for at, _ in found], [image for _, image in found], None
    trainer.actor.refresh(trainer)
    outputs = most_likely(trainer, rows)
    values = torch.tensor([output.values for _, output in outputs])
    total = weighted_rewards(values, trainer.rewards.weights).tolist()
    prompts = [trainer.actor.question(row)[1] for row, _ in outputs]
    images = [output.images[0] for _, output in outputs]
    return prompts, images, [None if value != value else value for value in total]


def _unscored(trainer: Any, batch: list[dict[str, Any]]) -> list[Image]:
    rollout = trainer.actor.act(trainer.model, batch, 1, random=None, mode="greedy")
    return [drawn(trainer, sample)[0] for sample in rollout.samples]
