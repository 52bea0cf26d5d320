"""Options of reward and process-reward modelling, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from shared.runtime.options import option
from shared.trainers.scoring_options import PairRewardOptions
from textalign.options import TextOptions


@dataclass
class RewardOptions(PairRewardOptions, TextOptions):
    """Reward modelling."""


@dataclass
class PRMOptions(TextOptions):
    """Process-reward modelling."""

    learning_rate: float = option(1e-5, "Peak learning rate of AdamW.")
    max_prompt_length: int | None = option(None, "Prompts lose their beginning beyond so many tokens. Unset: no cut.")
    max_completion_length: int | None = option(
        None, "All steps of a row together lose their end beyond so many tokens. Unset: no cut."
    )
    step_separator: str = option("\n", "Text that follows each step; its last token carries the step's label.")
    train_on_last_step_only: bool = option(False, "Learn the last step of each row alone; all steps are evaluated.")
    disable_dropout: bool = option(True, "Train without dropout.")
