"""What settles the options of the online trainers, beside AlignConfig."""

from __future__ import annotations

from typing import Any

from shared.errors import UserError
from shared.trainers.recipes import with_recipe
from shared.trainers.rollout import round_shape


class WithRecipe(type):
    """Puts the recipe that is named below the options that are given, before a dataclass sees them."""

    def __call__(cls, *args: Any, **given: Any):
        return super().__call__(*args, **with_recipe(given))


class OnlineConfig:
    """Mixed into a configuration with RolloutOptions, before AlignConfig."""

    def __post_init__(self):
        super().__post_init__()
        self.logging_nan_inf_filter = False  # it would hide from the log that a run has broken down
        if self.steps_per_generation is not None and self.generation_batch_size is not None:
            raise UserError("steps_per_generation and generation_batch_size say the same: give one of them.")
        if self.generation_batch_size is not None:
            rows = self.per_device_train_batch_size * self.world_size
            if self.generation_batch_size % rows:
                raise UserError(
                    f"generation_batch_size {self.generation_batch_size}: must be a multiple of {rows}, the rows of a "
                    "micro-batch over all processes."
                )
            self.steps_per_generation = self.generation_batch_size // rows
        elif self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        for name in ("steps_per_generation", "num_iterations"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: must be at least 1.")
        round_shape(self, self.world_size)
        if (
            self.reward_weights is not None
            and self.reward_funcs
            and len(self.reward_weights) != len(self.reward_funcs)
        ):
            raise UserError(
                f"reward_weights has {len(self.reward_weights)} number(s) for {len(self.reward_funcs)} reward(s): "
                "give one each."
            )
