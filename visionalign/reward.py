"""Reward modelling on images and videos: a score for an answer about them, learnt from pairs of answers.

The model is the vision-language model with a score head of one label in the place of its language-model head. What is
saved is loaded by `visionalign.rewards.VLMRewardModel`, wherever rewards are named, and, once that module is imported,
by transformers' `AutoModelForSequenceClassification`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

from shared.data.rows import ROW
from shared.data.schema import Kind
from shared.errors import UserError
from shared.policies.score import ScorePolicy, inner_model
from shared.rewards.base import text_of
from shared.rewards.models import tell_padding
from shared.runtime.models import HUB_OPTIONS
from shared.trainers.datasets import check_evaluation, check_steps
from shared.trainers.score_heads import (
    check_head_is_trained,
    check_scorer,
    new_head_expected,
    pad_apart,
    scoring_adapter,
)
from shared.trainers.scoring import PairRewardConfig, PairRewardTrainer
from visionalign.families import placeholder_ids
from visionalign.pairs import VLMPairCollator, check_pairs, pair_collator, question_of, read_images
from visionalign.preparing import VLMRun, left_out_notes, load_vlm, prepare_rows, prepare_vlm
from visionalign.reward_options import VLMRewardOptions

TASK = "SEQ_CLS"


@dataclass
class VLMRewardConfig(VLMRewardOptions, PairRewardConfig):
    """Options of VLMRewardTrainer: VLMRewardOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "reward_vlm"


class VLMRewardTrainer(PairRewardTrainer):
    """Train a reward model on preference pairs about images and videos.

    What a pair shows is processed once and seen once for both answers.

    Args:
        model: hub id, folder or built-in name of a vision-language model, whose score head is drawn, or of a scoring
            model; or a loaded scoring model (a PEFT model too).
        args: options; the defaults where None.
        data_collator: one by `args` where None.
        train_dataset: rows with `images` (or `image`) or `videos` (or `video`), `chosen` and `rejected`, strings or
            conversations, a `prompt` where these do not hold it, and where it is known by how much the chosen answer
            is better `margin`.
        eval_dataset: held-out rows of the same kind, or several sets by name.
        processing_class: the model's processor; loaded beside a model that is given by name.
        compute_metrics: not taken.
        callbacks, optimizers: as transformers.Trainer.
        quantization_config: as `from_pretrained`, where the model is given by name.
        peft_config: puts this adapter on the model, with the score head trained in full; a folder or hub id of an
            adapter goes on training that one.

    Raises:
        UserError: a text-only model, one that gives other scores, an adapter that leaves the score head out.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.

    Example:
        >>> trainer = VLMRewardTrainer("HuggingFaceTB/SmolVLM-Instruct", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: VLMRewardConfig | None = None,
        data_collator: VLMPairCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        if compute_metrics is not None:
            raise UserError("compute_metrics is not taken: evaluation sums up exactly, and has its metrics.")
        args = VLMRewardConfig.of(args)
        check_evaluation(args, eval_dataset)
        run = prepare_vlm(model, args, processing_class)
        self.model_name = run.model_name
        init = args.model_init_kwargs or {}
        check_scorer(model, TASK, 1, **{name: init[name] for name in HUB_OPTIONS if name in init})
        peft_config = scoring_adapter(peft_config, TASK)
        _, train, held_out = prepare_rows(train_dataset, eval_dataset, {Kind.PREFERENCE}, args)
        check_steps(args, train)
        if data_collator is None:
            _pad_apart(run)
            data_collator = pair_collator(run, args)
        check_pairs(data_collator, train, args)
        options = {} if quantization_config is None else {"quantization_config": quantization_config}
        with new_head_expected(args.seed):
            model = load_vlm(
                model, args, head="sequence-classification", peft_config=peft_config, num_labels=1, **options
            )
        check_head_is_trained(model)
        tell_padding(inner_model(model), data_collator.tokenizer)
        super().__init__(
            model,
            args,
            policy=ScorePolicy(model, share_prefix=args.share_prefix),
            data_collator=data_collator,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=run.processor,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.row_notes = left_out_notes(train)

    def title(self) -> str:
        return f"Vision-language reward modelling: {self.model_name}"

    def describe(self, row: dict[str, Any]) -> tuple[str, str, str]:
        chats = read_images(row, row[ROW])
        _, question = self.data_collator.prompts.shown(question_of(chats[0]))
        chosen, rejected = (text_of(chat.messages[chat.prompt_messages :]) for chat in chats)
        return question, chosen, rejected

    def pictures(self, row: dict[str, Any]) -> list[Any]:
        images, _ = self.data_collator.prompts.shown(question_of(read_images(row, row[ROW])[0]))
        return images


def _pad_apart(run: VLMRun) -> None:
    """The tokenizer gets a token to pad with that neither ends an answer nor holds an image's place."""
    tokenizer = run.processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    pad_apart(tokenizer, placeholder_ids(run.processor, family=run.family))
