"""Direct preference optimisation and the losses of its family, on pairs of answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shared.trainers.preference import PairedTrainer, dpo_objective
from textalign.config import TextConfig
from textalign.preference import TextReferenceTrainer
from textalign.preference_options import DPOOptions


@dataclass
class DPOConfig(DPOOptions, TextConfig):
    """Options of DPOTrainer: DPOOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "dpo"


class DPOTrainer(TextReferenceTrainer, PairedTrainer):
    """Train a language model on pairs of a chosen and a rejected answer, against a reference model.

    Rafailov et al. 2023, arXiv:2305.18290; `args.loss_type` names one of the losses that followed, or several.
    Arguments as TextReferenceTrainer.

    Example:
        >>> trainer = DPOTrainer("Qwen/Qwen3-0.6B", args=DPOConfig(beta=0.1), train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    config_class = DPOConfig

    def objective_options(self, args: DPOConfig) -> dict[str, Any]:
        return {"objective": dpo_objective(args)}
