"""Reward modelling: a score for an answer, learnt from pairs of which one answer is preferred.

The score is that of transformers' sequence classification with one label, so that what is saved is loaded by
`AutoModelForSequenceClassification` and, as a reward, by `shared.rewards.models.RewardModel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from shared.data.collators import PairCollator
from shared.data.schema import Kind
from shared.errors import UserError
from shared.policies.score import ScorePolicy
from shared.trainers.score_heads import check_head_is_trained, check_scorer, new_head_expected, scoring_adapter
from shared.trainers.scoring import PairRewardTrainer
from textalign.config import TextConfig
from textalign.preparing import HUB_OPTIONS, load_text_model, prepare_text
from textalign.reward_options import RewardOptions


@dataclass
class RewardConfig(RewardOptions, TextConfig):
    """Options of RewardTrainer: RewardOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "reward_modeling"

    def __post_init__(self):
        super().__post_init__()
        if (self.center_rewards_coefficient or 0.0) < 0:
            raise UserError(f"center_rewards_coefficient {self.center_rewards_coefficient}: must be at least 0.")


class RewardTrainer(PairRewardTrainer):
    """Train a reward model on preference pairs.

    Args:
        model: hub id, folder or built-in name of a language model (its score head is drawn) or of a reward model; or a
            loaded sequence-classification model with one label (a PEFT model too).
        args: options; `RewardConfig()` where None.
        data_collator: gives batches as PairCollator does; one by `args` where None.
        train_dataset: rows with `chosen` and `rejected`, strings or conversations, with or without `prompt`, and where
            it is known by how much the chosen answer is better `margin`.
        eval_dataset: held-out rows of the same kind, or several sets by name.
        processing_class: the model's tokenizer; loaded beside a model that is given by name.
        callbacks, optimizers: as transformers.Trainer.
        quantization_config: as `from_pretrained`, where the model is given by name.
        peft_config: puts this adapter on the model, with the score head trained in full; a folder or hub id of an
            adapter goes on training that one.

    Raises:
        UserError: a model that gives no single score, an adapter that leaves the score head out.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.

    Example:
        >>> trainer = RewardTrainer("Qwen/Qwen3-0.6B", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: RewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        args = RewardConfig() if args is None else args
        init = getattr(args, "model_init_kwargs", None) or {}
        check_scorer(model, "SEQ_CLS", 1, **{name: init[name] for name in HUB_OPTIONS if name in init})
        peft_config = scoring_adapter(peft_config, "SEQ_CLS")
        run = self.text = prepare_text(
            model,
            args,
            config_class=RewardConfig,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            allowed={Kind.PREFERENCE},
            tokenising=lambda kind: {},
        )
        tokenizer = run.tokenizer
        if args.pad_token is None:
            pad_apart(tokenizer)
        options = {} if quantization_config is None else {"quantization_config": quantization_config}
        with new_head_expected(args.seed):
            model = load_text_model(
                model,
                args,
                tokenizer,
                head="sequence-classification",
                peft_config=peft_config,
                num_labels=1,
                **options,
            )
        check_head_is_trained(model)
        super().__init__(
            model,
            args,
            policy=ScorePolicy(model, share_prefix=args.share_prefix),
            data_collator=data_collator
            or PairCollator(tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of),
            train_dataset=run.train,
            eval_dataset=run.held_out,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        run.tell(self)

    def title(self) -> str:
        return f"Reward modelling: {self.text.model_name}"

    def describe(self, row: dict[str, Any]) -> tuple[str, str, str]:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        prompt, chosen, rejected = (self.text.tokenizer.decode(row[n], skip_special_tokens=True) for n in names)
        return prompt, chosen, rejected


def pad_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    """Pad with a token that ends no text, where the tokenizer has one.

    transformers reads a row's score at its last token that is not the pad token: padded with the token that ends a
    text, it would not look at the end of an answer, which tells a finished one from one that was cut.
    """
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    template = str(tokenizer.chat_template or "")
    in_use = {tokenizer.eos_token, tokenizer.bos_token}
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in [tokenizer.unk_token, *special]:
        if token is not None and token not in in_use and token not in template:
            tokenizer.pad_token = token
            return
