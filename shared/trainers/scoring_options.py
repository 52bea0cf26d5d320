"""Options of the trainers of reward models, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from shared.runtime.arguments import AlignOptions
from shared.runtime.options import option


@dataclass
class PairRewardOptions(AlignOptions):
    """Rewards learnt from pairs of answers."""

    learning_rate: float = option(1e-4, "Peak learning rate of AdamW.")
    center_rewards_coefficient: float | None = option(
        None, "Weight of the squared sum of a pair's rewards, which keeps them near 0 (0.01 is usual). Unset: 0."
    )
    disable_dropout: bool = option(True, "Train without dropout.")
    share_prefix: bool = option(
        True, "Run each prompt once for both of its answers, where the model can; the result is the same."
    )
