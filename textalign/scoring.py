"""What the text trainers of scoring models share: a head that gives scores in the place of the language-model head."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from shared.data.schema import Kind
from shared.errors import UserError
from shared.policies.score import ScorePolicy
from shared.runtime.models import Head
from shared.trainers.score_heads import check_head_is_trained, check_scorer, new_head_expected, scoring_adapter
from shared.trainers.scoring import ScoringTrainer
from textalign.preparing import HUB_OPTIONS, TextRun, load_text_model, prepare_text


class TextScoringTrainer(ScoringTrainer):
    """Base of the text trainers of scoring models; a subclass is also a PairRewardTrainer or a StepRewardTrainer.

    Args:
        model: hub id, folder or built-in name of a language model, whose score head is drawn, or of a scoring model;
            or a loaded scoring model (a PEFT model too).
        args: options; the defaults where None.
        data_collator: gives batches as the trainer's own does, which is used where None.
        train_dataset: rows of the kind that the trainer takes.
        eval_dataset: held-out rows of the same kind, or several sets by name.
        processing_class: the model's tokenizer; loaded beside a model that is given by name.
        compute_metrics: not taken.
        callbacks, optimizers: as transformers.Trainer.
        quantization_config: as `from_pretrained`, where the model is given by name.
        peft_config: puts this adapter on the model, with the score head trained in full; a folder or hub id of an
            adapter goes on training that one.

    Raises:
        UserError: a model that gives other scores, an adapter that leaves the score head out.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.
    """

    config_class: ClassVar[type]
    kind: ClassVar[Kind]
    head: ClassVar[Head]
    task_type: ClassVar[str]  # PEFT's name of the task
    num_labels: ClassVar[int]
    text: TextRun

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        if compute_metrics is not None:
            raise UserError("compute_metrics is not taken: evaluation sums up exactly, and has its metrics.")
        args = self.config_class.of(args)
        init = getattr(args, "model_init_kwargs", None) or {}
        hub = {name: init[name] for name in HUB_OPTIONS if name in init}
        check_scorer(model, self.task_type, self.num_labels, **hub)
        peft_config = scoring_adapter(peft_config, self.task_type)
        run = self.text = prepare_text(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            allowed={self.kind},
            tokenising=lambda kind: self.tokenising(args),
        )
        self.fit_tokenizer(run.tokenizer, args)
        options = {} if quantization_config is None else {"quantization_config": quantization_config}
        with new_head_expected(args.seed):
            model = load_text_model(
                model,
                args,
                run.tokenizer,
                head=self.head,
                peft_config=peft_config,
                num_labels=self.num_labels,
                **options,
            )
        check_head_is_trained(model)
        super().__init__(
            model,
            args,
            policy=ScorePolicy(model, share_prefix=getattr(args, "share_prefix", True)),
            data_collator=data_collator or self.collator(run, args),
            train_dataset=run.train,
            eval_dataset=run.held_out,
            processing_class=run.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        run.tell(self)

    def tokenising(self, args: Any) -> dict[str, Any]:
        """What Tokeniser is told besides the options that all text trainers have."""
        return {}

    def fit_tokenizer(self, tokenizer: PreTrainedTokenizerBase, args: Any) -> None:
        """Change the tokenizer where the model's scores depend on it."""

    def collator(self, run: TextRun, args: Any) -> Any:
        """Makes batches of token rows."""
        raise NotImplementedError
