"""How an online trainer takes part in transformers' loop: endless micro-batches, and what each step counts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from shared.trainers.rollout import MicroBatch

if TYPE_CHECKING:
    from shared.trainers.online import OnlineTrainer


class Stream:
    """An iterable without a length, for transformers' loop: how many steps there are is in max_steps."""

    def __init__(self, trainer: OnlineTrainer):
        self.trainer = trainer

    def __iter__(self) -> Iterator[MicroBatch]:
        while True:
            yield self.trainer.next_micro_batch()


class Steps(TrainerCallback):
    """Counts epochs by the prompts that were drawn, and the seconds of updates."""

    def __init__(self, trainer: OnlineTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer._logged = state.global_step
        if trainer._resume is None:
            trainer.buffer = None  # of an earlier train(), which its model has left behind

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer._seconds["update"] += time.perf_counter() - trainer._clock
        before, state.epoch = trainer.last_epoch, trainer.prompts.cursor / len(trainer.prompts.rows)
        trainer.last_epoch = state.epoch
        if int(before) != int(state.epoch) and state.global_step < state.max_steps:
            control.should_evaluate |= args.eval_strategy == "epoch"
            control.should_save |= args.save_strategy == "epoch"
