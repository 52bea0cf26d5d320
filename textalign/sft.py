"""Supervised fine-tuning of language models.

The rows are tokenised before the model is loaded, and what was cut is said. Packed documents do not see each other.
Images, and metrics computed from whole logits, which never exist here, are not handled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from shared.data.collators import SupervisedCollator
from shared.data.packing import packed, plan
from shared.data.schema import Kind
from shared.data.tokens import TokenTable
from shared.errors import DataError, UserError
from shared.policies.base import GroupedBatch
from shared.policies.packed import PackedPolicy, refuse_learnt_prompt, wants_one_row
from shared.policies.token import TokenPolicy
from shared.runtime.offloading import ActivationOffloading
from shared.runtime.report import SampleRow
from shared.trainers.answers import answer, evenly_spaced, exact_matches, first_set, sampled
from shared.trainers.datasets import check_steps, usable_rows
from shared.trainers.offline import SupervisedTrainer
from textalign.config import TextConfig
from textalign.preparing import load_text_model, prepare_text
from textalign.sft_options import SFTOptions

KINDS = (Kind.LANGUAGE_MODELING, Kind.MESSAGES, Kind.PROMPT_COMPLETION, Kind.TOKENS)
ANSWERED = (Kind.MESSAGES, Kind.PROMPT_COMPLETION)
TEXTS_FOR_AN_ANSWER = 16  # texts that have no answer are read, not written: so many more of them are
NOT_TAKEN = {
    "compute_loss_func": "Choose the objective with loss_type.",
    "compute_metrics": "Evaluation gives loss, perplexity, token accuracy and entropy, and the answers' accuracy.",
    "preprocess_logits_for_metrics": "Evaluation gives loss, perplexity, token accuracy and entropy.",
}


@dataclass
class SFTConfig(SFTOptions, TextConfig):
    """Options of SFTTrainer: SFTOptions and transformers.TrainingArguments.

    Raises:
        UserError: options that do not go together.
    """

    run_name_stem: ClassVar[str] = "sft"

    def _check_options(self) -> None:
        super()._check_options()
        if self.loss_type == "chunked_nll":
            self.loss_type = "nll"
        known = {"skip_prepare_dataset"}
        if unknown := sorted(set(self.dataset_kwargs or {}) - known):
            raise UserError(
                f"dataset_kwargs: {', '.join(unknown)} is not taken. Allowed: skip_prepare_dataset. Special tokens "
                "come from the tokenizer and its chat template."
            )
        if self.eval_packing is None:
            self.eval_packing = self.packing
        if (self.packing or self.eval_packing) and self.max_length is None:
            raise UserError("packing needs max_length: it is the length of the packed rows.")


class SFTTrainer(SupervisedTrainer):
    """Fine-tune a language model on text, conversations, prompts with completions, or tokens.

    Args:
        model: hub id, folder or built-in name, or a loaded model (a PEFT model too).
        args: options; `SFTConfig()` where None, and of a plain transformers.TrainingArguments what is not its default.
        data_collator: a SupervisedCollator, or what gives a GroupedBatch as it does; one by `args` where None.
        train_dataset: rows with `text`, `messages`, `prompt` and `completion`, or `input_ids` (with `labels`,
            `completion_mask` or `assistant_masks`); `tools` and `chat_template_kwargs` reach the chat template.
        eval_dataset: held-out rows of the same kind, or several sets by name.
        processing_class: the tokenizer; the model's own where None.
        callbacks, optimizers, optimizer_cls_and_kwargs: as transformers.Trainer.
        quantization_config: as `from_pretrained`, where the model is given by name.
        peft_config: puts this adapter on the model; a folder or hub id of an adapter goes on training that one.
        formatting_func: row -> text; the rows are then that text.
        compute_loss_func, compute_metrics, preprocess_logits_for_metrics: not taken, since whole logits never exist.

    Raises:
        UserError: options that cannot be followed; packing with a model that cannot keep documents apart.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.

    Example:
        >>> trainer = SFTTrainer("Qwen/Qwen3-0.6B", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Callable[[list[dict]], GroupedBatch] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[dict], str] | None = None,
    ):
        refuse_whole_logits(
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        args = SFTConfig.of(args)
        packs = args.packing or args.eval_packing
        if packs or args.padding_free:
            refuse_learnt_prompt(peft_config, "packing" if packs else "padding_free")
        rows = _Given(args, formatting_func)
        run = prepare_text(
            model,
            args,
            train_dataset=rows.read(train_dataset, "train_dataset"),
            eval_dataset=rows.read_held_out(eval_dataset),
            processing_class=processing_class,
            allowed=KINDS,
            tokenising=lambda kind: rows.tokenising(kind, train_dataset, packed=args.packing),
            held_out_tokenising=lambda kind: rows.tokenising(kind, train_dataset, packed=args.eval_packing),
            text_field=rows.text_field,
        )
        train, held_out = _arranged(run.train, run.held_out, args)
        check_steps(args, train)
        if data_collator is not None:
            _check_collator(data_collator, train)
        init = {} if quantization_config is None else {"quantization_config": quantization_config}
        model = load_text_model(model, args, run.tokenizer, peft_config=peft_config, **init)
        padding_free = wants_one_row(model) if args.padding_free is None else args.padding_free
        if data_collator is None:
            pad = {"padding_free": padding_free, "pad_to_multiple_of": args.pad_to_multiple_of}
            data_collator = SupervisedCollator(run.tokenizer.pad_token_id, **pad)
        if packs or padding_free:
            policy = PackedPolicy(model, option="packing" if packs else "padding_free", share_prefix=False)
        else:
            policy = TokenPolicy(model, share_prefix=False)
        self.run = run
        super().__init__(
            model,
            args,
            policy=policy,
            data_collator=data_collator,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=run.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.offloading = ActivationOffloading(self.model) if args.activation_offloading else contextlib.nullcontext
        run.tell(self)
        if args.eval_packing:
            plain = self.read_held_out
            self.read_held_out = lambda rows: _pack(plain(rows), args, "eval")

    def title(self) -> str:
        return f"Supervised fine-tuning: {self.run.model_name}"

    def compute_loss(self, *args: Any, **kwargs: Any):
        """As SupervisedTrainer; with activation_offloading the activations wait in the processor's memory."""
        with self.offloading():
            return super().compute_loss(*args, **kwargs)

    def answer_questions(self) -> tuple[dict[str, float], list[SampleRow]] | None:
        """Figures of held-out rows: the share answered word for word, by `kind`; of texts loss and perplexity."""
        if self.run.kind not in ANSWERED:
            return self._read_texts()
        rows = evenly_spaced(self.run.questions, self.args.eval_answers)
        if rows is None:
            return None
        answers = answer(self.model, rows, self.run.encode_prompts, self.run.tokenizer, self.args)
        return exact_matches(answers), sampled(answers, self.run.sample)

    def _read_texts(self) -> tuple[dict[str, float], list[SampleRow]] | None:
        table = first_set(self.eval_dataset)
        if table is None or not self.args.eval_answers:
            return None
        count = min(len(table), TEXTS_FOR_AN_ANSWER * self.args.eval_answers)
        some = table.select(np.arange(count) * len(table) // count)
        metrics = self.evaluation_loop(self.get_eval_dataloader(some), "", metric_key_prefix="").metrics
        return {name.removeprefix("_"): value for name, value in metrics.items()}, []


def refuse_whole_logits(**given: Any) -> None:
    """Raise UserError for an argument that is given, of those in NOT_TAKEN."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{name} is not taken: logits of whole rows never exist here. {NOT_TAKEN[name]}")


def _check_collator(collator: Callable, rows: Any) -> None:
    first = next(iter(rows))
    try:
        batch = collator([first])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        batch = error
    if not isinstance(batch, GroupedBatch):
        raise UserError(
            f"data_collator gave a {type(batch).__name__} for a row of {', '.join(first)}; it is to give a "
            "GroupedBatch as SupervisedCollator does. Leave it out: the trainer's own pads and masks by the options."
        )


class _Given:
    """How the rows that a trainer is given are read, and what of them is learnt.

    Args:
        args: the options.
        formatting_func: the trainer's.

    Attributes:
        text_field: the column of plain text.
    """

    def __init__(self, args: SFTConfig, formatting_func: Callable[[dict], str] | None):
        self.args, self.formatting_func = args, formatting_func
        self.text_field = args.dataset_text_field if formatting_func is None else "text"

    def read_held_out(self, rows: Any) -> Any:
        """Held-out rows, or several sets of them."""
        if isinstance(rows, dict):
            return {name: self.read(each, f"eval_dataset {name!r}") for name, each in rows.items()}
        return self.read(rows, "eval_dataset")

    def read(self, rows: Any, what: str) -> Any:
        """The rows; with a formatting_func what it makes of them, under `text`."""
        take = self.formatting_func
        if take is None or rows is None or isinstance(rows, dict):
            return rows
        rows = usable_rows(rows, what)

        def text_of(row: dict, number: int) -> dict[str, str | None]:
            text = take(row)
            if not isinstance(text, str) and self.args.on_bad_row == "error":
                raise DataError(
                    f"row {number}: formatting_func gave a {type(text).__name__}: it is to give one text for one row."
                )
            return {"text": text if isinstance(text, str) else None}

        if hasattr(rows, "__len__"):
            return [text_of(row, number) for number, row in enumerate(rows)]
        return rows.map(text_of, with_indices=True, remove_columns=list(next(iter(rows), ())))

    def tokenising(self, kind: Kind, rows: Any, *, packed: bool) -> dict[str, Any]:
        """What the tokeniser is told for rows of this kind."""
        args = self.args
        if (args.dataset_kwargs or {}).get("skip_prepare_dataset") and kind != Kind.TOKENS:
            raise UserError(f"skip_prepare_dataset: the rows are not tokenised: they are {kind}. Give input_ids.")
        told: dict[str, Any] = {"loss_on": self._loss_on(kind, rows)}
        if packed and args.packing_strategy != "bfd":
            told["max_length"] = None  # long documents go on in another row
        return told

    def _loss_on(self, kind: Kind, rows: Any) -> str:
        completion, tokens = self.args.completion_only_loss, kind == Kind.TOKENS
        if completion and kind not in (Kind.PROMPT_COMPLETION, Kind.TOKENS):
            raise UserError(
                f"completion_only_loss needs rows with prompt and completion; these are {kind}. For rows of messages "
                "use assistant_only_loss."
            )
        if self.args.assistant_only_loss or (tokens and _has_column(rows, "assistant_masks")):
            if kind == Kind.LANGUAGE_MODELING:
                raise UserError("assistant_only_loss needs rows of messages; these are plain text.")
            if completion is False and kind == Kind.PROMPT_COMPLETION:
                raise UserError(
                    "assistant_only_loss without completion_only_loss: what the assistant says in a prompt is not "
                    "learnt. Give rows of messages, or leave completion_only_loss unset."
                )
            return "assistant"
        if completion is None:
            completion = kind == Kind.PROMPT_COMPLETION or (tokens and _has_column(rows, "completion_mask"))
        return "completion" if completion else "all"


def _has_column(rows: Any, name: str) -> bool:
    return name in next(iter(rows), ())


def _arranged(train: Any, held_out: Any, args: SFTConfig) -> tuple[Any, Any]:
    """The token rows as they are trained and evaluated on."""
    if isinstance(train, TokenTable):
        if args.shuffle_dataset:
            train = train.select(np.random.default_rng(args.data_seed).permutation(len(train)))
        train = _pack(train, args, "train") if args.packing else train
    elif args.packing:
        raise UserError("packing needs all rows at hand, and these are a stream. Leave out packing, or streaming.")
    elif args.shuffle_dataset:
        train = train.shuffle(seed=args.data_seed)
    if args.eval_packing and held_out is not None:
        if isinstance(held_out, dict):
            held_out = {name: _pack(table, args, name) for name, table in held_out.items()}
        else:
            held_out = _pack(held_out, args, "eval")
    return train, held_out


def _pack(table: TokenTable, args: SFTConfig, what: str) -> TokenTable:
    packing = plan(table.lengths, args.max_length, args.packing_strategy)
    if args.should_log:
        print(packing.text(what), flush=True)
    return packed(table, packing)
