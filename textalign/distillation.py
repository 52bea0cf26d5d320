"""Generalised knowledge distillation of language models: a student learns a teacher's distribution of the next token.

The divergence is taken at the tokens of completions alone, straight from hidden states. Student and teacher have one
tokenizer; their sizes and architectures may differ. Packed rows are not handled, nor is the likelihood of the data
added to the divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from shared.data.collators import SupervisedCollator
from shared.data.schema import Kind
from shared.errors import UserError
from shared.policies.base import GroupedBatch
from shared.policies.token import TokenPolicy
from shared.runtime.report import SampleRow
from shared.trainers.answers import answer, evenly_spaced, exact_matches, first_set, sampled
from shared.trainers.datasets import check_steps
from shared.trainers.distillation import DistillationTrainer
from textalign.config import NOT_TAKEN, TextConfig
from textalign.distillation_options import GKDOptions
from textalign.preparing import load_text_model, prepare_text
from textalign.referenced import tokens_known
from textalign.sft import TEXTS_FOR_AN_ANSWER, refuse_whole_logits
from textalign.teachers import Teacher

KINDS = (Kind.MESSAGES, Kind.PROMPT_COMPLETION, Kind.PROMPT_ONLY, Kind.TOKENS)
ANSWERED = (Kind.MESSAGES, Kind.PROMPT_COMPLETION)
PACKED = "Rows are not packed here: answers that are written in training have lengths of their own. Leave it out."


@dataclass
class GKDConfig(GKDOptions, TextConfig):
    """Options of GKDTrainer: GKDOptions and transformers.TrainingArguments.

    Raises:
        UserError: numbers out of range, or options that do not go together.
    """

    run_name_stem: ClassVar[str] = "gkd"
    not_taken: ClassVar[dict[str, str]] = {
        **NOT_TAKEN,
        **dict.fromkeys(("packing", "eval_packing", "packing_strategy", "padding_free"), PACKED),
        "loss_type": "The objective is the divergence, which beta chooses.",
        "completion_only_loss": "Leave it out: the divergence is at the completion's tokens in any case.",
        "dataset_kwargs": "Leave it out: rows become tokens before training, and rows of input_ids stay as they are.",
        "dataset_text_field": "Plain text has no completion: give rows of prompt and completion, or of messages.",
        "teacher_tokenizer_name_or_path": "Teacher and student have one tokenizer: leave it out.",
        "max_completion_length": "It is called max_new_tokens.",
    }

    def _check_options(self) -> None:
        super()._check_options()
        for name, what in (("lmbda", "a share of the rows"), ("beta", "a share of the teacher in the mixture")):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} {getattr(self, name)}: must be in [0, 1]: it is {what}.")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: must be 0 (the most likely token) or more.")
        if not 0 < self.loss_temperature < float("inf"):
            raise UserError(f"loss_temperature {self.loss_temperature}: must be a positive number.")
        if self.lmbda == 1 and self.seq_kd:
            raise UserError(
                "lmbda 1 and seq_kd: the student answers all rows, and none is left to the teacher. Lower lmbda, or "
                "leave seq_kd out."
            )


class GKDTrainer(DistillationTrainer):
    """Distil a teacher into a language model, on the data's completions and on completions of its own.

    Agarwal et al. 2023, arXiv:2306.13649. Of each optimizer step's rows a share `lmbda` is answered by the student as
    it then is; the others keep the data's completions or, with `seq_kd`, are answered by the teacher. The student
    learns the teacher's distribution at every token of a completion, by a Jensen-Shannon divergence.

    Args:
        model: the student: hub id, folder or built-in name, or a loaded model (a PEFT model too).
        teacher_model: the teacher's name or model, which is frozen; `args.teacher_model_name_or_path` where None. With
            neither, a student with an adapter is taught by itself without it.
        args: options; `GKDConfig()` where None, and of a plain transformers.TrainingArguments what is not its default.
        data_collator: a SupervisedCollator, or what gives a GroupedBatch as it does; one by `args` where None.
        train_dataset: rows with `prompt` and `completion`, or `messages`, of which all that the assistant says is
            learnt and the last answer is the one that is written anew; tokenised rows with `completion_mask`,
            `assistant_masks` or `labels`; or rows with a `prompt` alone, where lmbda is 1 or with seq_kd.
        eval_dataset: held-out rows of the same kind, or several sets by name; prompts without a completion are
            answered by the student, greedily.
        processing_class: the tokenizer; the student's own where None.
        callbacks, optimizers: as transformers.Trainer.
        peft_config: puts this adapter on the student; a folder or hub id of an adapter goes on training that one.
        compute_metrics, preprocess_logits_for_metrics, formatting_func: not taken.

    Raises:
        UserError: options that cannot be followed; a teacher with another tokenizer.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.

    Example:
        >>> trainer = GKDTrainer("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-7B", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        teacher_model: str | PreTrainedModel | nn.Module | None = None,
        args: GKDConfig | TrainingArguments | None = None,
        data_collator: Callable[[list[dict]], GroupedBatch] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        formatting_func: Callable | None = None,
    ):
        refuse_whole_logits(
            compute_metrics=compute_metrics, preprocess_logits_for_metrics=preprocess_logits_for_metrics
        )
        if formatting_func is not None:
            raise UserError("formatting_func makes one text of a row, without a completion to distil. Leave it out.")
        args = GKDConfig.of(args)
        has_adapter = peft_config is not None or hasattr(model, "peft_config")
        teacher = Teacher(teacher_model, args, has_adapter=has_adapter, student=model)
        run = prepare_text(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            allowed=KINDS,
            tokenising=lambda kind: _tokenising(kind, train_dataset, args, teacher),
        )
        check_steps(args, run.train)
        self.run = run
        teacher.check_tokens(run.tokenizer, tokens_known(model, args))
        model = load_text_model(model, args, run.tokenizer, peft_config=peft_config)
        super().__init__(
            model,
            args,
            policy=TokenPolicy(model, share_prefix=False),
            longest_prompt=_room(args),
            answered=run.kind is not Kind.PROMPT_ONLY,
            data_collator=data_collator
            or SupervisedCollator(run.tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of),
            train_dataset=run.train,
            eval_dataset=run.held_out,
            processing_class=run.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        run.tell(self)
        self.take_teacher(teacher.load(self.model, args.seed))

    def title(self) -> str:
        return f"Distillation: {self.run.model_name}"

    def answer_questions(self) -> tuple[dict[str, float], list[SampleRow]] | None:
        """Figures of held-out rows: divergence and agreement, and the share answered word for word, by `kind`."""
        table = first_set(self.eval_dataset)
        if table is None or not self.args.eval_answers:
            return None
        count = min(len(table), TEXTS_FOR_AN_ANSWER * self.args.eval_answers)
        some = table.select(np.arange(count) * len(table) // count)
        found = self.evaluation_loop(self.get_eval_dataloader(some), "", metric_key_prefix="").metrics
        metrics = {name.removeprefix("_"): value for name, value in found.items()}
        rows = evenly_spaced(self.run.questions, self.args.eval_answers)
        if rows is None or self.run.kind is Kind.TOKENS:
            return metrics, []
        answers = answer(self.model, rows, self.run.encode_prompts, self.run.tokenizer, self.args)
        matches = exact_matches(answers) if self.run.kind in ANSWERED else {}
        return metrics | matches, sampled(answers, self.run.sample)


def _tokenising(kind: Kind, rows: Any, args: GKDConfig, teacher: Teacher) -> dict[str, Any]:
    """What the tokeniser is told for rows of this kind; the positions of the student are known by now.

    Raises:
        UserError: rows that the options cannot use, or are too long for the teacher.
    """
    writes = bool(args.lmbda or args.seq_kd)
    positions = teacher.positions
    if positions is not None and (args.max_length is None or args.max_length > positions):
        raise UserError(f"max_length {args.max_length}: the teacher has {positions} positions. Give {positions}.")
    if writes and args.max_length is not None and args.max_new_tokens >= args.max_length:
        raise UserError(
            f"max_new_tokens {args.max_new_tokens} leave no room for a prompt in rows of max_length {args.max_length}."
        )
    if kind is Kind.PROMPT_ONLY:
        if not (args.lmbda == 1 or args.seq_kd):
            raise UserError(
                f"These rows are prompts without completions, and with lmbda {args.lmbda} a share of them is not "
                "answered by anybody. Set lmbda to 1, or let the teacher answer them (seq_kd)."
            )
        return {"max_length": None, "max_prompt_length": _room(args)}
    return {"loss_on": _loss_on(kind, rows, args)}


def _loss_on(kind: Kind, rows: Any, args: GKDConfig) -> str:
    if kind is Kind.MESSAGES or args.assistant_only_loss:
        return "assistant"
    if kind is Kind.PROMPT_COMPLETION:
        return "completion"
    columns = next(iter(rows), ())
    if "completion_mask" in columns:
        return "completion"
    if "assistant_masks" in columns:
        return "assistant"
    if "labels" not in columns:
        raise UserError(
            "Tokenised rows do not say what is their completion: give completion_mask, assistant_masks or labels."
        )
    return "all"


def _room(args: GKDConfig) -> int | None:
    """How long a prompt may be, so that it fits into a row together with an answer."""
    return None if args.max_length is None else args.max_length - args.max_new_tokens
