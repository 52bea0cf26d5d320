"""Preference optimisation on pairs without a reference: CPO, SimPO, AlphaPO and ORPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from shared.objectives.preference import cpo_objective, orpo_objective
from shared.trainers.preference import PairedTrainer
from textalign.config import TextConfig
from textalign.preference import TextPreferenceTrainer
from textalign.preference_options import CPOOptions, ORPOOptions


@dataclass
class CPOConfig(CPOOptions, TextConfig):
    """Options of CPOTrainer: CPOOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "cpo"


@dataclass
class ORPOConfig(ORPOOptions, TextConfig):
    """Options of ORPOTrainer: ORPOOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "orpo"


class CPOTrainer(TextPreferenceTrainer, PairedTrainer):
    """Train a language model on pairs of a chosen and a rejected answer, without a reference model.

    CPO (Xu et al. 2024, arXiv:2401.08417); with `args.loss_type` SimPO (Meng et al. 2024, arXiv:2405.14734) and
    AlphaPO (Gupta et al. 2025, arXiv:2501.03884). Arguments as TextPreferenceTrainer.
    """

    config_class = CPOConfig

    def objective_options(self, args: CPOConfig) -> dict[str, Any]:
        options = ("beta", "label_smoothing", "simpo_gamma", "alpha", "cpo_alpha")
        return {"objective": cpo_objective(args.loss_type, **{name: getattr(args, name) for name in options})}


class ORPOTrainer(TextPreferenceTrainer, PairedTrainer):
    """Fine-tune on chosen answers and away from rejected ones in one stage, without a reference model.

    Hong et al. 2024, arXiv:2403.07691. Arguments as TextPreferenceTrainer.
    """

    config_class = ORPOConfig

    def objective_options(self, args: ORPOConfig) -> dict[str, Any]:
        return {"objective": orpo_objective(beta=args.beta)}
