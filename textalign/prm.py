"""Process-reward modelling: whether each step of a solution is right, said at the step's end.

The model is transformers' token classification with two labels, 0 wrong and 1 right (Uesato et al. 2022,
arXiv:2211.14275; Lightman et al. 2023, arXiv:2305.20050). What is saved is loaded by
`AutoModelForTokenClassification` and, as a reward, by `shared.rewards.models.RewardModel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from shared.data.collators import StepCollator
from shared.data.schema import Kind
from shared.errors import UserError
from shared.policies.score import ScorePolicy
from shared.trainers.score_heads import check_head_is_trained, check_scorer, new_head_expected, scoring_adapter
from shared.trainers.scoring import StepRewardTrainer
from textalign.config import TextConfig
from textalign.preparing import HUB_OPTIONS, load_text_model, prepare_text
from textalign.reward_options import PRMOptions

LENGTHS = ("max_length", "max_prompt_length", "max_completion_length")


@dataclass
class PRMConfig(PRMOptions, TextConfig):
    """Options of PRMTrainer: PRMOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "prm"

    def __post_init__(self):
        super().__post_init__()
        if not self.step_separator:
            raise UserError("step_separator is empty: its last token carries a step's label. Give at least a space.")
        for name in LENGTHS:
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} {value}: must be at least 1, or none for no limit.")


class PRMTrainer(StepRewardTrainer):
    """Train a process-reward model on solutions whose steps are labelled.

    Args:
        model: hub id, folder or built-in name of a language model (its score head is drawn) or of a process-reward
            model; or a loaded token-classification model with two labels (a PEFT model too).
        args: options; `PRMConfig()` where None.
        data_collator: gives batches as StepCollator does; one by `args` where None.
        train_dataset: rows with `prompt` (a string or messages), `completions` (the steps, strings) and `labels` (true
            where the step is right).
        eval_dataset: held-out rows of the same kind, or several sets by name.
        processing_class: the model's tokenizer; loaded beside a model that is given by name.
        callbacks, optimizers: as transformers.Trainer.
        quantization_config: as `from_pretrained`, where the model is given by name.
        peft_config: puts this adapter on the model, with the score head trained in full; a folder or hub id of an
            adapter goes on training that one.

    Raises:
        UserError: a model that does not give two scores a token, an adapter that leaves the score head out.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.

    Example:
        >>> trainer = PRMTrainer("Qwen/Qwen3-0.6B", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: PRMConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        args = PRMConfig() if args is None else args
        init = getattr(args, "model_init_kwargs", None) or {}
        check_scorer(model, "TOKEN_CLS", 2, **{name: init[name] for name in HUB_OPTIONS if name in init})
        peft_config = scoring_adapter(peft_config, "TOKEN_CLS")
        run = self.text = prepare_text(
            model,
            args,
            config_class=PRMConfig,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            allowed={Kind.STEPWISE},
            tokenising=lambda kind: {
                "step_separator": args.step_separator,
                **{name: getattr(args, name) for name in LENGTHS},
            },
        )
        tokenizer = run.tokenizer
        options = {} if quantization_config is None else {"quantization_config": quantization_config}
        with new_head_expected(args.seed):
            model = load_text_model(
                model,
                args,
                tokenizer,
                head="token-classification",
                peft_config=peft_config,
                num_labels=2,
                **options,
            )
        check_head_is_trained(model)
        super().__init__(
            model,
            args,
            policy=ScorePolicy(model),
            data_collator=data_collator
            or StepCollator(tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of),
            train_dataset=run.train,
            eval_dataset=run.held_out,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        run.tell(self)

    def title(self) -> str:
        return f"Process-reward modelling: {self.text.model_name}"

    def describe(self, row: dict[str, Any]) -> tuple[str, list[bool]]:
        return self.text.tokenizer.decode(row["input_ids"], skip_special_tokens=True), row["step_labels"].tolist()
