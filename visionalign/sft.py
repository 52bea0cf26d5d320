"""Supervised fine-tuning of vision-language models.

The rows are checked before the model is loaded; images are processed once a batch, in the data workers; the loss is on
the assistant's tokens alone unless asked otherwise. Video and packing are not handled here.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from shared.data.rows import ROW, Rows, with_row_numbers
from shared.data.schema import Kind, check_rows, decode_image, detect_kind, to_conversation, undecoded
from shared.errors import DataError, UserError
from shared.policies.token import TokenPolicy
from shared.runtime.adapters import attach_adapter
from shared.runtime.generation import greedy_answers
from shared.runtime.launch import engine_asked, on_first_process
from shared.runtime.models import load_config, load_model, load_processor
from shared.runtime.report import SampleRow
from shared.trainers.config import AlignConfig
from shared.trainers.offline import SupervisedTrainer
from visionalign.collators import VLMCollator
from visionalign.families import PARTS, family_of, parameters
from visionalign.options import VLMSFTOptions

SAMPLES_SHOWN = 24


@dataclass
class VLMSFTConfig(VLMSFTOptions, AlignConfig):
    """Options of VLMSFTTrainer: VLMSFTOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "sft_vlm"


class VLMSFTTrainer(SupervisedTrainer):
    """Fine-tune a vision-language model on conversations about images.

    Args:
        model: hub id, folder or built-in name, or a loaded model (a PEFT model too).
        args: options; `VLMSFTConfig()` where None.
        data_collator: a VLMCollator, or what gives batches and prompts as it does; one by `args` where None.
        train_dataset: rows with `messages`, or `prompt` and `completion`, and `images` (or `image`).
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
        if args.eval_strategy != "no" and eval_dataset is None:
            raise UserError(
                f"eval_strategy is {args.eval_strategy.value}, but there are no held-out rows. Give eval_dataset (on "
                "the command line a data set with a test split, or --eval_fraction), or set eval_strategy to no."
            )
        options = dict(args.model_init_kwargs or {})
        hub = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
        self.family = family_of(load_config(model, **hub) if isinstance(model, str) else model.config)
        if processing_class is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            if not name:
                raise UserError("processing_class is missing: this model does not say where its processor is.")
            processing_class = load_processor(name, **hub)
        self.model_name = model if isinstance(model, str) else model.config._name_or_path or type(model).__name__
        if args.should_log:
            print(f"model: {self.model_name} ({self.family.name})", flush=True)
        train, held_out, kind = _checked_rows(train_dataset, eval_dataset, args)
        if not isinstance(train, Rows) and args.max_steps <= 0:
            raise UserError("max_steps is missing: a stream does not say how many rows it has, so give the steps.")
        step = args.per_device_train_batch_size * args.world_size
        if args.dataloader_drop_last and isinstance(train, Rows) and len(train) < step:
            raise UserError(
                f"dataloader_drop_last: {len(train)} rows do not fill a batch of {step}, so no step would be trained. "
                "Leave the option out, or make the batch smaller."
            )
        if data_collator is None:
            data_collator = VLMCollator(
                processing_class,
                family=self.family,
                kind=kind,
                loss_on=_loss_on(args, kind),
                max_length=args.max_length,
                max_pixels=args.max_pixels,
                on_bad_row=args.on_bad_row,
                pad_to_multiple_of=args.pad_to_multiple_of,
                always_image=_shards_the_model(),
            )
        if isinstance(train, Rows) and args.on_bad_row == "error":
            data_collator([train[i] for i in range(min(2, len(train)))])  # a mistake in every row shows here

        set_seed(args.seed)  # weights that are drawn here are alike in all processes
        if isinstance(model, str):
            frozen = peft_config is not None
            model = load_model(model, head="image-text-to-text", frozen=frozen, seed=args.seed, **options)
        adapter = {"path": peft_config} if isinstance(peft_config, str) else {"config": peft_config}
        model = attach_adapter(model, **adapter, checkpointing=bool(args.activation_checkpointing))
        _freeze(model, args)
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
        self.row_notes = {row: f"left out: {why}" for row, why in getattr(train, "left_out", {}).items()}

    def title(self) -> str:
        return f"Vision-language fine-tuning: {self.model_name}"

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
        rows = self.eval_dataset
        if isinstance(rows, dict):
            rows = next(iter(rows.values()), None)
        if not isinstance(rows, Rows) or self.args.eval_answers < 1:
            return None
        count = min(self.args.eval_answers, len(rows))
        picked = Rows(rows, kept=[at * len(rows) // count for at in range(count)])
        share = picked.share(self.args.process_index, self.args.world_size)
        answered: list[tuple[int, str, str]] = []
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(share), size):
            batch = [share[at] for at in range(start, min(start + size, len(share)))]
            inputs, references = self.data_collator.encode_prompts(batch)
            inputs = {name: value.to(self.args.device) for name, value in inputs.items()}
            texts = greedy_answers(
                self.model, inputs, self.processing_class.tokenizer, max_new_tokens=self.args.max_new_tokens
            )
            at = [(start + i) * self.args.world_size + self.args.process_index for i in range(len(batch))]
            answered += list(zip(at, texts, references, strict=True))
        return self._scored(picked, self._gathered(answered))

    def _gathered(self, answered: list[tuple[int, str, str]]) -> dict[int, tuple[str, str]]:
        if self.args.world_size > 1:
            from accelerate.utils import gather_object

            answered = gather_object(answered)
        return {at: (text, reference) for at, text, reference in answered}

    def _scored(self, picked: Rows, answers: dict[int, tuple[str, str]]) -> tuple[dict[str, float], list[SampleRow]]:
        right: dict[str, list[bool]] = defaultdict(list)
        samples = []
        every = max(1, len(picked) // SAMPLES_SHOWN)
        for at in range(len(picked)):
            text, reference = answers[at]
            row = picked[at]
            correct = text.strip() == reference.strip()
            right["accuracy"].append(correct)
            if isinstance(row.get("kind"), str):
                right[f"accuracy/{row['kind']}"].append(correct)
            if at % every == 0 and len(samples) < SAMPLES_SHOWN:
                samples.append(self._sample(row, text, reference))
        return {name: sum(each) / len(each) for name, each in sorted(right.items())}, samples

    def _sample(self, row: dict[str, Any], text: str, reference: str) -> SampleRow:
        conversation = to_conversation(row, row[ROW], self.data_collator.kind)
        asked = [m for m in conversation.messages if m["role"] == "user"]
        question = " ".join(part["text"] for part in asked[-1]["content"] if part["type"] == "text") if asked else ""
        images = [decode_image(image, row=row[ROW], max_pixels=65_536) for image in conversation.images]
        columns = {name: row[name] for name in ("kind",) if name in row}
        return SampleRow(images, question, reference, after=text, columns=columns)


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


def _checked_rows(train: Any, held_out: Any, args: VLMSFTConfig) -> tuple[Any, Any, Kind]:
    """Rows that can be used, and what kind they are."""
    if train is None:
        raise UserError("train_dataset is missing: give the rows to train on.")
    kind = _kind(train)
    images = sys.maxsize if args.check_rows is None else args.check_rows

    def checked(rows: Any, what: str) -> Any:
        report = on_first_process(
            lambda: check_rows(rows, kind, on_bad_row=args.on_bad_row, check_images=images, what=what)
        )
        if args.should_log:
            print(report.summary(what), flush=True)
        rows = undecoded(rows)
        return Rows(rows, report.kept, report.bad) if hasattr(rows, "__len__") else with_row_numbers(rows)

    def checked_held_out(rows: Any, what: str) -> Rows:
        if not hasattr(rows, "__len__"):  # an evaluation goes over all its rows: a stream is read once, into memory
            rows = list(undecoded(rows))
        return checked(rows, what)

    if isinstance(held_out, dict):
        return checked(train, "train"), {name: checked_held_out(rows, name) for name, rows in held_out.items()}, kind
    return checked(train, "train"), None if held_out is None else checked_held_out(held_out, "eval"), kind


def _shards_the_model() -> bool:
    """Whether each process holds a part of the vision tower only, so that all must run it in every step."""
    return is_deepspeed_zero3_enabled() or engine_asked("FSDP")


def _kind(rows: Any) -> Kind:
    if isinstance(rows, dict):
        raise UserError(
            f"train_dataset holds the splits {', '.join(map(str, rows))}: give one, data['train'] for one."
        )
    first = next(iter(rows), None)
    if first is None:
        raise DataError("The data set is empty: it has no row to train on.")
    return detect_kind(list(first), first, allowed={Kind.MESSAGES, Kind.PROMPT_COMPLETION})


def _freeze(model: nn.Module, args: VLMSFTConfig) -> None:
    frozen = (args.freeze_vision_tower, args.freeze_projector, args.freeze_language_model)
    for part, freeze in zip(PARTS, frozen, strict=True):
        for parameter in parameters(model, part).values() if freeze else []:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("Every part of the model is frozen: nothing would be trained. Leave one --freeze_… out.")
