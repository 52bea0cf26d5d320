"""Options of reward and process-reward modelling, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from shared.runtime.options import option
from textalign.options import TextOptions


@dataclass
class RewardOptions(TextOptions):
    """Reward modelling."""

    learning_rate: float = option(1e-4, "Peak learning rate of AdamW.")
    center_rewards_coefficient: float | None = option(
        None, "Weight of the squared sum of a pair's rewards, which keeps them near 0 (0.01 is usual). Unset: 0."
    )
    disable_dropout: bool = option(True, "Train without dropout.")
    share_prefix: bool = option(
        True, "Run each prompt once for both of its answers, where the model can; the result is the same."
    )


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
