"""Process-reward modelling: whether each step of a solution is right, said at the step's end.

The model is transformers' token classification with two labels, 0 wrong and 1 right (Uesato et al. 2022,
arXiv:2211.14275; Lightman et al. 2023, arXiv:2305.20050). What is saved is loaded by
`AutoModelForTokenClassification` and, as a reward, by `shared.rewards.models.RewardModel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shared.data.collators import StepCollator
from shared.data.schema import Kind
from shared.errors import UserError
from shared.trainers.scoring import StepRewardTrainer
from textalign.config import TextConfig
from textalign.preparing import TextRun
from textalign.reward_options import PRMOptions
from textalign.scoring import TextScoringTrainer

LENGTHS = ("max_length", "max_prompt_length", "max_completion_length")


@dataclass
class PRMConfig(PRMOptions, TextConfig):
    """Options of PRMTrainer: PRMOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "prm"

    def __post_init__(self):
        super().__post_init__()
        if not self.step_separator:
            raise UserError("step_separator is empty: its last token carries a step's label. Give at least a space.")
        for name in LENGTHS:
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} {value}: must be at least 1, or none for no limit.")


class PRMTrainer(TextScoringTrainer, StepRewardTrainer):
    """Train a process-reward model on solutions whose steps are labelled.

    `train_dataset` has rows with `prompt` (a string or messages), `completions` (the steps, strings) and `labels`
    (true where the step is right). A loaded model is one for token classification with two labels. Arguments as
    TextScoringTrainer.

    Example:
        >>> trainer = PRMTrainer("Qwen/Qwen3-0.6B", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    config_class = PRMConfig
    kind = Kind.STEPWISE
    head = "token-classification"
    task_type = "TOKEN_CLS"
    num_labels = 2

    def tokenising(self, args: PRMConfig) -> dict[str, Any]:
        return {"step_separator": args.step_separator, **{name: getattr(args, name) for name in LENGTHS}}

    def collator(self, run: TextRun, args: PRMConfig) -> StepCollator:
        return StepCollator(run.tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of)

    def title(self) -> str:
        return f"Process-reward modelling: {self.text.model_name}"

    def describe(self, row: dict[str, Any]) -> tuple[str, list[bool]]:
        return self.text.tokenizer.decode(row["input_ids"], skip_special_tokens=True), row["step_labels"].tolist()
