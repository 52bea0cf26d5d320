"""When a run acts between its steps: before the first one, and when a signal asks it to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import TrainerCallback

if TYPE_CHECKING:
    from shared.trainers.base import AlignTrainer


class Watch(TrainerCallback):
    """The moments of a run at which AlignTrainer acts."""

    def __init__(self, trainer: AlignTrainer):
        self.trainer = trainer
        self._asked: tuple[Tensor, torch.distributed.Work] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._asked = None
        self.trainer._open_run()
        self.trainer._answers_before()

    def on_step_end(self, args, state, control, **kwargs):
        if self._must_stop():
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        if self._asked is not None:  # a process that ends with a question under way is aborted
            self._asked[1].wait()
            self._asked = None

    def _must_stop(self) -> bool:
        """Whether any process has got a signal. All must stop after the same step, so all ask each other.

        The answer is read one step later: by then it has arrived, and asking costs no waiting.
        """
        received = self.trainer.interruption.received
        if self.trainer.args.world_size == 1:
            return received is not None
        said = torch.tensor(float(received or 0), device=self.trainer.args.device)
        work = torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX, async_op=True)
        before, self._asked = self._asked, (said, work)
        if before is None:
            return False
        before[1].wait()
        stop = int(before[0].item())
        self.trainer.interruption.received = received or stop or None
        return stop > 0
