"""Preference optimisation on single answers labelled good or bad: KTO and BCO."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from shared.data.collators import UnpairedCollator
from shared.data.schema import Kind
from shared.data.tokens import TokenTable
from shared.data.unpairing import unpaired
from shared.errors import UserError
from shared.objectives.pair_losses import known
from shared.objectives.unpaired import apo_zero_unpaired, bco, kto
from shared.trainers.density import DensityRatio
from shared.trainers.unpaired import UnpairedState, UnpairedTrainer
from textalign.config import TextConfig
from textalign.preference import TextReferenceTrainer
from textalign.preference_options import BCOOptions, KTOOptions
from textalign.preparing import TextRun


def _unpaired(rows: Any, args: Any) -> Any:
    return unpaired(rows, args.on_bad_row)


LOSSES = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}


@dataclass
class KTOConfig(KTOOptions, TextConfig):
    """Options of KTOTrainer: KTOOptions and transformers.TrainingArguments.

    Raises:
        UserError: a batch of one row where the loss pairs each row with another.
    """

    run_name_stem: ClassVar[str] = "kto"

    def __post_init__(self):
        if self.loss_type == "kto":
            if self.per_device_train_batch_size < 2 or self.per_device_eval_batch_size < 2:
                raise UserError(
                    "per_device_train_batch_size and per_device_eval_batch_size must be at least 2 for KTO: each "
                    "prompt is paired with the answer of another row of the batch. Or use --loss_type "
                    "apo_zero_unpaired."
                )
            if self.precompute_ref_log_probs:
                raise UserError(
                    "precompute_ref_log_probs cannot be used with loss_type kto, which pairs prompts with other "
                    "rows' answers anew in each batch. Leave it out, or use --loss_type apo_zero_unpaired."
                )
        super().__post_init__()


@dataclass
class BCOConfig(BCOOptions, TextConfig):
    """Options of BCOTrainer: BCOOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "bco"


class KTOTrainer(TextReferenceTrainer, UnpairedTrainer):
    """Train a language model on single answers labelled good or bad, against a reference model.

    Ethayarajh et al. 2024, arXiv:2402.01306. The reference point is estimated once for each optimizer step, over all
    of its rows. Preference pairs are taken too: each becomes a good and a bad answer. Arguments as
    TextReferenceTrainer.
    """

    config_class = KTOConfig
    kinds = (Kind.UNPAIRED,)
    read_rows = staticmethod(_unpaired)

    def objective_options(self, args: KTOConfig) -> dict[str, Any]:
        weights = {"desirable_weight": args.desirable_weight, "undesirable_weight": args.undesirable_weight}
        for name, value in weights.items():
            if value < 0:
                raise UserError(f"{name} {value}: must be at least 0.")
        _check_beta(args.beta)
        loss = LOSSES[known(args.loss_type, LOSSES, "KTO loss")]
        uses_kl = args.loss_type == "kto"

        def objective(ratios: Tensor, good: Tensor, state: UnpairedState) -> Tensor:
            point = {"kl": state.kl} if uses_kl else {}
            return loss(ratios, good, **point, beta=args.beta, **weights)

        return {"objective": objective, "uses_kl": uses_kl}

    def collator(self, run: TextRun, args: KTOConfig) -> Callable:
        return UnpairedCollator(
            run.tokenizer.pad_token_id,
            kl=args.loss_type == "kto",
            max_length=args.max_length,
            lone_row="uncounted",  # a last batch of one row; smaller batches are refused by the configuration
            pad_to_multiple_of=args.pad_to_multiple_of,
        )


class BCOTrainer(TextReferenceTrainer, UnpairedTrainer):
    """Train a language model on single answers labelled good or bad, as a binary classifier of its own rewards.

    Jung et al. 2024, arXiv:2404.04656. The shift δ is the mean reward of all earlier steps.

    Args:
        embedding_func: `f(input_ids, attention_mask) -> (N, D)` embeds prompts: bad rows are then weighted by how
            likely their prompts are among the good rows' prompts (the paper's underlying distribution matching).
        embedding_tokenizer: makes its inputs of prompts; the trainer's tokenizer where None.
        As TextReferenceTrainer otherwise.
    """

    config_class = BCOConfig
    kinds = (Kind.UNPAIRED,)
    read_rows = staticmethod(_unpaired)

    def __init__(
        self, *args: Any, embedding_func: Callable | None = None, embedding_tokenizer: Any = None, **kwargs: Any
    ):
        self.density: DensityRatio | None = None
        super().__init__(*args, **kwargs)
        if embedding_func is not None:
            self._weight_rows(embedding_func, embedding_tokenizer or self.run.tokenizer)

    def _weight_rows(self, embedding_func: Callable, tokenizer: Any) -> None:
        """Weights of bad rows as a column of the training rows."""
        if not isinstance(self.train_dataset, TokenTable):
            raise UserError("embedding_func needs all rows at hand, and these are a stream. Leave one of them out.")
        self.density = DensityRatio(
            embedding_func,
            tokenizer,
            accelerator=self.accelerator,
            prompt_sample_size=self.args.prompt_sample_size,
            min_density_ratio=self.args.min_density_ratio,
            max_density_ratio=self.args.max_density_ratio,
            seed=self.args.seed,
        )
        table = self.train_dataset
        prompts = self.run.tokenizer.batch_decode([row["prompt_ids"] for row in table], skip_special_tokens=True)
        labels = table.columns["label"]
        self.density.fit(prompts, labels)
        self.train_dataset = table.with_column("density_ratio", self.density.weights(prompts, labels))

    def objective_options(self, args: BCOConfig) -> dict[str, Any]:
        _check_beta(args.beta)
        if not 0 <= args.min_density_ratio <= args.max_density_ratio:
            raise UserError(
                f"min_density_ratio {args.min_density_ratio}, max_density_ratio {args.max_density_ratio}: the first "
                "must be at least 0 and at most the second."
            )
        return {"objective": partial(_bco, beta=args.beta), "uses_shift": True}

    def collator(self, run: TextRun, args: BCOConfig) -> Callable:
        return UnpairedCollator(run.tokenizer.pad_token_id, kl=False, pad_to_multiple_of=args.pad_to_multiple_of)


def _check_beta(beta: float) -> None:
    if not (beta > 0 and math.isfinite(beta)):
        raise UserError(f"beta {beta}: must be a positive number.")


def _bco(ratios: Tensor, good: Tensor, state: UnpairedState, *, beta: float) -> Tensor:
    return bco(ratios, good, state.shift, beta=beta, density_ratio_P=state.weights)
