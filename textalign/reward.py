"""Reward modelling: a score for an answer, learnt from pairs of which one answer is preferred.

The score is that of transformers' sequence classification with one label, so that what is saved is loaded by
`AutoModelForSequenceClassification` and, as a reward, by `shared.rewards.models.RewardModel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from shared.data.collators import PairCollator
from shared.data.schema import Kind
from shared.trainers.score_heads import pad_apart
from shared.trainers.scoring import PairRewardConfig, PairRewardTrainer
from textalign.config import TextConfig
from textalign.preparing import TextRun
from textalign.reward_options import RewardOptions
from textalign.scoring import TextScoringTrainer


@dataclass
class RewardConfig(RewardOptions, PairRewardConfig, TextConfig):
    """Options of RewardTrainer: RewardOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "reward_modeling"


class RewardTrainer(TextScoringTrainer, PairRewardTrainer):
    """Train a reward model on preference pairs.

    `train_dataset` has rows with `chosen` and `rejected`, strings or conversations, with or without `prompt`, and
    where it is known by how much the chosen answer is better `margin`. A loaded model is one for sequence
    classification with one label. Arguments as TextScoringTrainer.

    Example:
        >>> trainer = RewardTrainer("Qwen/Qwen3-0.6B", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    config_class = RewardConfig
    kind = Kind.PREFERENCE
    head = "sequence-classification"
    task_type = "SEQ_CLS"
    num_labels = 1

    def fit_tokenizer(self, tokenizer: PreTrainedTokenizerBase, args: RewardConfig) -> None:
        if args.pad_token is None:
            pad_apart(tokenizer)

    def collator(self, run: TextRun, args: RewardConfig) -> PairCollator:
        return PairCollator(run.tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of)

    def title(self) -> str:
        return f"Reward modelling: {self.text.model_name}"

    def describe(self, row: dict[str, Any]) -> tuple[str, str, str]:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        prompt, chosen, rejected = (self.text.tokenizer.decode(row[n], skip_special_tokens=True) for n in names)
        return prompt, chosen, rejected
