"""What the text trainers on preferences share: rows, model, reference and judge put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from shared.data.collators import PairCollator
from shared.data.schema import Kind
from shared.policies.token import TokenPolicy
from shared.trainers.judging import Judge
from shared.trainers.preference import PreferenceTrainer, check_arguments
from textalign.preparing import TextRun, load_text_model, prepare_text
from textalign.referenced import TextReference


class TextPreferenceTrainer(PreferenceTrainer):
    """Base of the text trainers on preferences; a subclass is also a PairedTrainer or an UnpairedTrainer.

    Args:
        model: hub id, folder or built-in name, or a loaded model (a PEFT model too).
        args: options; the defaults where None.
        data_collator: makes a GroupedBatch of token rows; the trainer's own where None.
        train_dataset: preference rows; see shared.data.schema for the columns.
        eval_dataset: held-out rows of the same kind, or several sets by name.
        processing_class: the tokenizer; the model's own where None.
        model_init: not taken: give the model or its name.
        callbacks, optimizers: as transformers.Trainer.
        preprocess_logits_for_metrics, compute_metrics: not taken, since whole logits never exist.
        peft_config: puts this adapter on the model; a folder or hub id of an adapter goes on training that one.
        quantization_config: as `from_pretrained`, where the model is given by name.
        judge: `f(prompt, answer) -> number`, scores generated answers, or several such; `args.judge` where None.

    Raises:
        UserError: options that cannot be followed; a model none of whose weights is trained.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.
    """

    config_class: ClassVar[type]
    kinds: ClassVar[tuple[Kind, ...]] = (Kind.PREFERENCE,)
    run: TextRun
    reference_given: Any = None  # what a trainer with a reference is to make it from

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: Any = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model_init: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        compute_metrics: Callable | None = None,
        *,
        quantization_config: Any = None,
        judge: Judge | Sequence[Judge] | None = None,
    ):
        check_arguments(compute_metrics, preprocess_logits_for_metrics, model_init)
        args = self.config_class.of(args)
        objective, judges = self.asked_for(args, judge)
        limits = {"max_prompt_length": args.max_prompt_length, "max_completion_length": args.max_completion_length}
        self.run = run = prepare_text(
            model,
            args,
            train_dataset=self.read_rows(train_dataset, args),
            eval_dataset=self.read_rows(eval_dataset, args),
            processing_class=processing_class,
            allowed=self.kinds,
            tokenising=lambda kind: limits,
        )
        self.loaded_from = model if isinstance(model, str) else None
        init = {} if quantization_config is None else {"quantization_config": quantization_config}
        model = load_text_model(model, args, run.tokenizer, peft_config=peft_config, **init)
        super().__init__(
            model,
            args,
            policy=TokenPolicy(model, share_prefix=args.share_prefix),
            asking=run,
            judges=judges,
            data_collator=data_collator or self.collator(run, args),
            train_dataset=run.train,
            eval_dataset=run.held_out,
            processing_class=run.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            ref_model=self.reference_given,
            **objective,
        )
        run.tell(self)

    def collator(self, run: TextRun, args: Any) -> Callable:
        """Makes batches of token rows."""
        return PairCollator(run.tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of)

    @staticmethod
    def read_rows(rows: Any, args: Any) -> Any:
        """The data set as the trainer reads it."""
        return rows

    def title(self) -> str:
        return f"{type(self).__name__.removesuffix('Trainer')}: {self.run.model_name}"


class TextReferenceTrainer(TextReference, TextPreferenceTrainer):
    """Base of the text trainers on preferences with a reference model.

    Args:
        ref_model: the reference: a model or its name; `args.ref_model_name_or_path` where None. Without either it is
            the model as it is at the start.
        As TextPreferenceTrainer otherwise.

    Raises:
        UserError: options that exclude each other or cannot be had; a model that cannot be its own reference.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        ref_model: str | PreTrainedModel | nn.Module | None = None,
        args: Any = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        preprocess_logits_for_metrics: Callable | None = None,
        judge: Judge | Sequence[Judge] | None = None,
    ):
        args = self.config_class.of(args)
        self.take_reference(model, ref_model, args, train_dataset=train_dataset, peft_config=peft_config)
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            peft_config=peft_config,
            compute_metrics=compute_metrics,
            quantization_config=quantization_config,
            judge=judge,
        )
