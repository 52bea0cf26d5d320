"""Learning from pairs of the model's own completions on text: online DPO, XPO and Nash-MD."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from shared.errors import UserError
from shared.rewards.combine import RewardSet
from shared.rewards.pairwise import PairReward, load_judge
from shared.trainers.online_preference import (
    ExploringPreferenceTrainer,
    NashPreferenceTrainer,
    OnlinePreferenceTrainer,
)
from shared.trainers.online_preference_config import OnlinePreferenceConfig, check_judged, check_schedule
from shared.trainers.preference import paired_objective
from shared.trainers.rewarding import check_best_metric, refuse_unknown, rewards_of
from shared.trainers.token_rollouts import engine_of, sampling_of, token_parts
from textalign.config import TextConfig
from textalign.online_preference_options import NashMDOptions, OnlineDPOOptions, XPOOptions
from textalign.preparing import TextRun, load_text_model
from textalign.prompting import prepare_prompts
from textalign.referenced import TextReference


@dataclass
class OnlineDPOConfig(OnlinePreferenceConfig, OnlineDPOOptions, TextConfig):
    """Options of OnlineDPOTrainer: OnlineDPOOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "dpo_online"

    def _check_options(self) -> None:
        super()._check_options()
        check_pair_losses(self)


@dataclass
class XPOConfig(OnlinePreferenceConfig, XPOOptions, TextConfig):
    """Options of XPOTrainer: XPOOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "xpo"

    def _check_options(self) -> None:
        super()._check_options()
        check_schedule("alpha", self.alpha)
        check_pair_losses(self)
        check_written_here(self, "the reference")


@dataclass
class NashMDConfig(OnlinePreferenceConfig, NashMDOptions, TextConfig):
    """Options of NashMDTrainer: NashMDOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "nash_md"
    not_taken: ClassVar[dict[str, str]] = {"loss_type": "Leave it out: Nash-MD has no loss of pairs to choose."}

    def _check_options(self) -> None:
        super()._check_options()
        check_schedule("mixture_coef", self.mixture_coef, most=1)
        check_written_here(self, "a mixture of model and reference")

    def __post_init__(self):
        super().__post_init__()
        self.on_policy_alone("Nash-MD's gradient is right for samples of the model as it is alone.")


def check_pair_losses(args: Any) -> None:
    """Raise UserError for losses that are not known or options that they do not have, at any epoch's β."""
    try:
        for beta in args.beta if isinstance(args.beta, list) else [args.beta]:
            paired_objective(args, beta=beta)
    except ValueError as error:  # an objective's own words for its options
        raise UserError(str(error)) from error


def check_written_here(args: Any, who: str) -> None:
    """Raise UserError where a server is to write, which has the policy alone."""
    if args.use_vllm:
        raise UserError(
            f"use_vllm: half of the completions are written by {who}, and the server has the model that is trained "
            "alone. Leave use_vllm out."
        )


class TextOnlinePreferenceTrainer(TextReference, OnlinePreferenceTrainer):
    """Base of the text trainers that learn from pairs of completions.

    Args:
        model: hub id, folder or built-in name, or a loaded model (a PEFT model too).
        ref_model: the reference: a model or its name; `args.ref_model_name_or_path` where None. Without either it is
            the model as it is at the start.
        reward_funcs: one reward or several, whose sum says which completion is better; see shared.rewards.loading.
            `args.reward_funcs` where None. Beside a judge they are only measured.
        judge: what says so instead: an object with a method `judge(prompts, completions)`, a function or a name; see
            shared.rewards.pairwise.load_judge. `args.judge` where None.
        args: options; the defaults where None.
        train_dataset: rows with a `prompt`, a text or a list of messages; their other columns go to the rewards.
        eval_dataset: held-out rows of the same kind, or several sets by name.
        processing_class: the tokenizer; the model's own where None.
        reward_processing_classes: tokenizers of reward models that are given as such, one a reward.
        peft_config: puts this adapter on the model; a folder or hub id of an adapter goes on training that one.
        callbacks, optimizers: as transformers.Trainer.
        quantization_config: as `from_pretrained`, where the model is given by name.

    Raises:
        UserError: options that cannot be followed; neither a reward nor a judge, or one that is not known; a model
            none of whose weights is trained.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.
    """

    config_class: ClassVar[type]
    run: TextRun

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        ref_model: str | PreTrainedModel | nn.Module | None = None,
        reward_funcs: Any = None,
        judge: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        **unknown: Any,
    ):
        refuse_unknown(type(self).__name__, unknown)
        args = self.config_class.of(args)
        sampling_of(args)
        self.take_reference(model, ref_model, args, train_dataset=train_dataset, peft_config=peft_config)
        self.run, encoder = prepare_prompts(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, processing_class=processing_class
        )
        run = self.run
        engine = engine_of(args, run.tokenizer)
        judged = judge is not None or args.judge is not None
        policy_side = (model, peft_config is not None or hasattr(model, "peft_config"))
        rewards = judging(
            judge, reward_funcs, args, run.train, processing_classes=reward_processing_classes, policy=policy_side
        )
        check_best_metric(self, args, rewards.names, run.held_out)
        self.loaded_from = model if isinstance(model, str) else None
        init = {} if quantization_config is None else {"quantization_config": quantization_config}
        model = load_text_model(model, args, run.tokenizer, peft_config=peft_config, **init)
        policy, actor = token_parts(model, args, encoder, engine)
        super().__init__(
            model,
            args,
            policy=policy,
            actor=actor,
            rewards=rewards,
            judged=judged,
            train_dataset=run.train,
            eval_dataset=run.held_out,
            processing_class=run.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            ref_model=self.reference_given,
        )
        self.row_notes = dict(run.left_out)

    def title(self) -> str:
        return f"{type(self).__name__.removesuffix('Trainer')}: {self.run.model_name}"


def judging(judge: Any, reward_funcs: Any, args: Any, rows: Any, *, processing_classes: Any, policy: Any) -> RewardSet:
    """The rewards, with the judge as the first of them where there is one; the others are then only measured.

    Args:
        judge, reward_funcs: the trainer's arguments; the options' where None.
        args: OnlinePreferenceOptions.
        rows, processing_classes, policy: as of rewards_of.

    Raises:
        UserError: there is neither a reward nor a judge, or one that is not known.
    """
    judge = args.judge if judge is None else judge
    given = args.reward_funcs if reward_funcs is None else reward_funcs
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    if judge is None and not given:
        raise UserError(
            "Nothing says which completion is better: give reward_funcs (functions, names, or a reward model's "
            "folder), or a judge."
        )
    if judge is None:
        return rewards_of(given, args, rows, processing_classes=processing_classes, policy=policy)
    check_judged(args)
    weighed = copy.copy(args)
    weighed.reward_weights = [1.0] + [0.0] * len(given)
    if processing_classes is not None:
        several = isinstance(processing_classes, (list, tuple))
        processing_classes = [None, *(processing_classes if several else [processing_classes])]
    pairs = PairReward(load_judge(judge, device=args.device))
    return rewards_of([pairs, *given], weighed, rows, processing_classes=processing_classes, policy=policy)


class OnlineDPOTrainer(TextOnlinePreferenceTrainer):
    """Online DPO on text: two completions of the model itself, the better one against the other.

    Guo et al. 2024, arXiv:2402.04792. Arguments as TextOnlinePreferenceTrainer.

    Example:
        >>> trainer = OnlineDPOTrainer("Qwen/Qwen3-0.6B", reward_funcs=score, train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    config_class = OnlineDPOConfig


class XPOTrainer(ExploringPreferenceTrainer, TextOnlinePreferenceTrainer):
    """XPO on text: a completion of the model against one of the reference, whose completions become less likely.

    Xie et al. 2024, arXiv:2405.21046. Arguments as TextOnlinePreferenceTrainer.
    """

    config_class = XPOConfig


class NashMDTrainer(NashPreferenceTrainer, TextOnlinePreferenceTrainer):
    """Nash-MD on text: a completion of the model, by its chance against one of a mixture of model and reference.

    Munos et al. 2023, arXiv:2312.00886. Arguments as TextOnlinePreferenceTrainer.
    """

    config_class = NashMDConfig
