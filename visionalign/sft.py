"""Supervised fine-tuning of vision-language models.

The rows are checked before the model is loaded; images and videos are decoded and processed once a batch, in the data
workers, ahead of the step; the loss is on the assistant's tokens alone unless asked otherwise. Packing is not handled
here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

from shared.data.rows import ROW, Rows
from shared.data.schema import Kind, to_conversation
from shared.errors import UserError
from shared.policies.token import TokenPolicy
from shared.runtime.report import SampleRow
from shared.trainers.answers import Answer, answer, evenly_spaced, exact_matches, sampled
from shared.trainers.config import AlignConfig
from shared.trainers.datasets import check_evaluation, check_steps
from shared.trainers.offline import SupervisedTrainer
from visionalign.collators import VLMCollator
from visionalign.families import PARTS, parameters
from visionalign.feature_cache import cache_features, check_cache
from visionalign.options import VLMSFTOptions
from visionalign.preparing import left_out_notes, load_vlm, prepare_rows, prepare_vlm, shards_the_model
from visionalign.reading import tower_passes
from visionalign.video import video_reader


@dataclass
class VLMSFTConfig(VLMSFTOptions, AlignConfig):
    """Options of VLMSFTTrainer: VLMSFTOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "sft_vlm"


class VLMSFTTrainer(SupervisedTrainer):
    """Fine-tune a vision-language model on conversations about images and videos.

    Args:
        model: hub id, folder or built-in name, or a loaded model (a PEFT model too).
        args: options; `VLMSFTConfig()` where None.
        data_collator: a VLMCollator, or what gives batches and prompts as it does; one by `args` where None.
        train_dataset: rows with `messages`, or `prompt` and `completion`, and `images` (or `image`), `videos` (or
            `video`) or both.
        eval_dataset: held-out rows of the same kind, or several sets by name.
        processing_class: the model's processor; loaded beside a model that is given by name.
        callbacks, optimizers: as transformers.Trainer.
        peft_config: puts this adapter on the model; a folder or hub id of an adapter goes on training that one.

    Raises:
        UserError: a text-only model, a processor without chat template.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.

    Example:
        >>> trainer = VLMSFTTrainer("HuggingFaceTB/SmolVLM-Instruct", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: VLMSFTConfig | None = None,
        data_collator: VLMCollator | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
    ):
        args = VLMSFTConfig() if args is None else args
        if not isinstance(args, VLMSFTConfig):
            raise UserError(f"args is a {type(args).__name__}; give a VLMSFTConfig, which takes the same options.")
        if data_collator is not None and not hasattr(data_collator, "encode_prompts"):
            raise UserError(
                "data_collator must be a VLMCollator or work as it does. Leave it out: the trainer's own processes "
                "images and masks labels by the model's family."
            )
        check_evaluation(args, eval_dataset)
        run = prepare_vlm(model, args, processing_class)
        processing_class, self.family, self.model_name = run.processor, run.family, run.model_name
        videos = video_reader(self.family, processing_class, args)
        kind, train, held_out = prepare_rows(
            train_dataset, eval_dataset, {Kind.MESSAGES, Kind.PROMPT_COMPLETION}, args
        )
        check_steps(args, train)
        if data_collator is None:
            always = tower_passes(train, kind, self.family) if shards_the_model() else set()
            data_collator = VLMCollator(
                processing_class,
                family=self.family,
                kind=kind,
                loss_on=_loss_on(args, kind),
                max_length=args.max_length,
                max_pixels=args.max_pixels,
                on_bad_row=args.on_bad_row,
                pad_to_multiple_of=args.pad_to_multiple_of,
                always_image="image" in always,
                always_video="video" in always,
                videos=videos,
            )
        if isinstance(train, Rows) and args.on_bad_row == "error":
            data_collator([train[i] for i in range(min(2, len(train)))])  # a mistake in every row shows here

        if args.cache_vision_features:
            check_cache(train, data_collator)
        model = load_vlm(model, args, peft_config=peft_config)
        super().__init__(
            model,
            args,
            policy=TokenPolicy(model),
            data_collator=data_collator,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.row_notes = left_out_notes(train)
        self.feature_cache = cache_features(self) if args.cache_vision_features else None

    def title(self) -> str:
        return f"Vision-language fine-tuning: {self.model_name}"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.feature_cache is not None:
            self.feature_cache.check_weights()

    def learning_rates(self) -> dict[str, float]:
        """The tower's, projector's and language model's own rates, by parameter name."""
        wanted = (
            self.args.vision_learning_rate,
            self.args.projector_learning_rate,
            self.args.language_learning_rate,
        )
        return {
            name: rate
            for part, rate in zip(PARTS, wanted, strict=True)
            if rate is not None
            for name in parameters(self.model, part)
        }

    def answer_questions(self) -> tuple[dict[str, float], list[SampleRow]] | None:
        """Answers of evenly spaced held-out rows; accuracy is the share answered word for word, by `kind`."""
        rows = evenly_spaced(self.eval_dataset, self.args.eval_answers)
        if rows is None:
            return None
        encode, tokenizer = self.data_collator.encode_prompts, self.processing_class.tokenizer
        answers = answer(self.model, rows, encode, tokenizer, self.args)
        return exact_matches(answers), sampled(answers, self._sample)

    def _sample(self, answer: Answer) -> SampleRow:
        row = answer.row
        conversation = to_conversation(row, row[ROW], self.data_collator.kind)
        asked = [m for m in conversation.messages if m["role"] == "user"]
        question = " ".join(part["text"] for part in asked[-1]["content"] if part["type"] == "text") if asked else ""
        images = self.data_collator.reader.shown(conversation)
        columns = {name: row[name] for name in ("kind",) if name in row}
        return SampleRow(images, question, answer.recorded, after=answer.text, columns=columns)


def _loss_on(args: VLMSFTConfig, kind: Kind) -> str:
    if kind == Kind.PROMPT_COMPLETION and args.completion_only_loss is not None:
        return "completion" if args.completion_only_loss else "all"
    if args.completion_only_loss and kind != Kind.PROMPT_COMPLETION:
        raise UserError(
            f"--completion_only_loss needs rows with prompt and completion; these are {kind}. "
            "Use --assistant_only_loss (the default)."
        )
    if not args.assistant_only_loss:
        return "all"
    return "completion" if kind == Kind.PROMPT_COMPLETION else "assistant"
