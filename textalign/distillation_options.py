"""Options of distillation on text, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from shared.runtime.options import option
from shared.trainers.distillation_options import DistillationOptions
from textalign.options import TextOptions


@dataclass
class GKDOptions(DistillationOptions, TextOptions):
    """Generalised knowledge distillation."""

    learning_rate: float = option(2e-5, "Peak learning rate of AdamW.")
    assistant_only_loss: bool = option(
        False, "Of completions with several turns learn the assistant's alone. Of messages that is so in any case."
    )
