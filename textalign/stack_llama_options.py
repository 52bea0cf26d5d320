"""The options of scripts/stack_llama.py. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import UserError
from shared.runtime.options import option

STAGES = ("sft", "reward", "rl")


@dataclass
class StackLlamaOptions:
    """Three stages.

    Raises:
        UserError: a stage that there is not.
    """

    recipes: str | None = option(
        None, "Folder with sft.yaml, reward.yaml and rl.yaml, the options of each stage. Unset: the built-in ones."
    )
    output_dir: str = option("runs/stack_llama", "Folder in which the stages run, and that their paths are in.")
    stages: list[str] = option(list(STAGES), "Stages to run, of sft, reward and rl; each needs those before it.")

    def __post_init__(self) -> None:
        if wrong := [name for name in self.stages if name not in STAGES]:
            raise UserError(f"stages: there is no {wrong[0]!r}; there are {', '.join(STAGES)}.")
