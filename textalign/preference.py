"""What the text trainers on preferences share: rows, model, reference and judge put together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from shared.data.collators import PairCollator
from shared.data.schema import Kind
from shared.errors import UserError
from shared.policies.token import TokenPolicy
from shared.runtime.models import load_model
from shared.trainers.judging import Judge, load_judge
from shared.trainers.preference import PreferenceTrainer
from shared.trainers.reference import Cached, FrozenCopy, Reference, make_reference
from shared.trainers.reference_cache import precompute, weights_of_model, weights_of_name
from shared.trainers.reference_sync import SyncReference, load_reference, save_reference
from textalign.preparing import TextRun, load_text_model, prepare_text


class TextPreferenceTrainer(PreferenceTrainer):
    """Base of the text trainers on preferences; a subclass is also a PairedTrainer or an UnpairedTrainer.

    Args:
        model: hub id, folder or built-in name, or a loaded model (a PEFT model too).
        args: options; the defaults where None.
        data_collator: makes a GroupedBatch of token rows; the trainer's own where None.
        train_dataset: preference rows; see shared.data.schema for the columns.
        eval_dataset: held-out rows of the same kind, or several sets by name.
        processing_class: the tokenizer; the model's own where None.
        compute_metrics, preprocess_logits_for_metrics: not taken, since whole logits never exist.
        callbacks, optimizers: as transformers.Trainer.
        quantization_config: as `from_pretrained`, where the model is given by name.
        peft_config: puts this adapter on the model; a folder or hub id of an adapter goes on training that one.
        judge: `f(prompt, answer) -> number`, scores generated answers; `args.judge` where None.

    Raises:
        UserError: options that cannot be followed.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.
    """

    config_class: ClassVar[type]
    kinds: ClassVar[tuple[Kind, ...]] = (Kind.PREFERENCE,)
    run: TextRun

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: Any = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        judge: Judge | None = None,
        **reference: Any,
    ):
        for name, value in (
            ("compute_metrics", compute_metrics),
            ("preprocess_logits_for_metrics", preprocess_logits_for_metrics),
        ):
            if value is not None:
                raise UserError(f"{name} is not taken: whole logits never exist here. Evaluation has its metrics.")
        args = self.config_class() if args is None else args
        if not isinstance(args, self.config_class):
            raise UserError(
                f"args is a {type(args).__name__}; give a {self.config_class.__name__}, which takes the same options."
            )
        try:
            objective = self.objective_options(args)
        except ValueError as error:  # an objective's own words for its options
            raise UserError(str(error)) from error
        judge = load_judge(args.judge) if judge is None else judge
        limits = {"max_prompt_length": args.max_prompt_length, "max_completion_length": args.max_completion_length}
        self.run = run = prepare_text(
            model,
            args,
            config_class=self.config_class,
            train_dataset=self.read_rows(train_dataset),
            eval_dataset=self.read_rows(eval_dataset),
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
            judge=judge,
            data_collator=data_collator or self.collator(run, args),
            train_dataset=run.train,
            eval_dataset=run.held_out,
            processing_class=run.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            **objective,
            **reference,
        )
        run.tell(self)

    def objective_options(self, args: Any) -> dict[str, Any]:
        """What PairedTrainer or UnpairedTrainer takes of the objective. Bad options are told here, before all else."""
        raise NotImplementedError

    def collator(self, run: TextRun, args: Any) -> Callable:
        """Makes batches of token rows."""
        return PairCollator(run.tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of)

    @staticmethod
    def read_rows(rows: Any) -> Any:
        """The data set as the trainer reads it."""
        return rows

    def title(self) -> str:
        return f"{type(self).__name__.removesuffix('Trainer')}: {self.run.model_name}"


class TextReferenceTrainer(TextPreferenceTrainer):
    """Base of the text trainers on preferences with a reference model.

    Args:
        ref_model: the reference: a model or its name; `args.ref_model_name_or_path` where None. Without either it is
            the model as it is at the start.
        As TextPreferenceTrainer otherwise.
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        ref_model: str | PreTrainedModel | nn.Module | None = None,
        args: Any = None,
        *others: Any,
        **kwargs: Any,
    ):
        super().__init__(model, args, *others, ref_model=ref_model, **kwargs)

    def reference_of(self, ref_model: str | nn.Module | None) -> Reference:
        """The reference, as the options want it; run beforehand where they say so."""
        args = self.args
        ref_model = args.ref_model_name_or_path if ref_model is None else ref_model
        init = dict(args.model_init_kwargs or {})

        def load(name: str, **options: Any) -> nn.Module:
            return load_model(name, head="causal-lm", frozen=True, seed=args.seed, **{**init, **options})

        def made(beforehand: bool) -> Reference:
            return make_reference(
                self.model,
                ref_model,
                accelerator=self.accelerator,
                policy=self.policy,
                load=load,
                name=self.loaded_from,
                share_prefix=args.share_prefix,
                num_shared_layers=args.ref_num_shared_layers,
                load_in_8bit=args.ref_load_in_8bit,
                synced=args.sync_ref_model,
                beforehand=beforehand,
            )

        if args.precompute_ref_log_probs:
            return self._run_beforehand(ref_model, made, init)
        reference = made(False)
        if args.sync_ref_model:
            every, alpha = args.ref_model_sync_steps, args.ref_model_mixup_alpha
            self.add_callback(SyncReference(reference, every=every, alpha=alpha))
        return reference

    def _run_beforehand(self, ref_model: Any, made: Callable[[bool], Reference], init: dict[str, Any]) -> Reference:
        """Put the reference's log-probabilities beside the rows; nothing is loaded where they are known already."""
        args = self.args
        zero3 = is_deepspeed_zero3_enabled()  # a model that is cut up runs in its engine alone
        if not zero3 and not getattr(self.model, "is_quantized", False):
            self.model.to(args.device)
        name = ref_model if isinstance(ref_model, str) else self.loaded_from if ref_model is None else None
        adapted = hasattr(self.model, "peft_config") and ref_model is None
        weights = None
        if name is not None and not adapted and not args.ref_load_in_8bit:
            weights = weights_of_name(name, **init)
        reference: Reference | Callable[[], Reference] = lambda: made(not zero3)  # noqa: E731
        if weights is None:
            reference = made(not zero3)
            weights = weights_of_model(reference.model if isinstance(reference, FrozenCopy) else self.model, reference)
        options = {
            "weights": weights,
            "model": self.model,
            "accelerator": self.accelerator,
            "batch_size": args.precompute_ref_batch_size or args.per_device_train_batch_size,
        }
        self.train_dataset = precompute(reference, self.train_dataset, self.data_collator, **options)
        held_out = self.eval_dataset
        if isinstance(held_out, dict):
            self.eval_dataset = {
                name: precompute(reference, rows, self.data_collator, what=name, **options)
                for name, rows in held_out.items()
            }
        elif held_out is not None:
            self.eval_dataset = precompute(reference, held_out, self.data_collator, what="eval", **options)
        return Cached()

    def save_extras(self, checkpoint: Path) -> None:
        super().save_extras(checkpoint)
        save_reference(self.model, self.reference, checkpoint, writes=self.args.should_save)

    def load_extras(self, checkpoint: Path) -> None:
        super().load_extras(checkpoint)
        load_reference(self.model, self.reference, checkpoint)
