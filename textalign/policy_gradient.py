"""Group-relative policy gradients on text: GRPO and its family, and RLOO."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from shared.errors import UserError
from shared.objectives.policy_gradient import PolicyGradient
from shared.rewards.combine import RewardSet
from shared.trainers.leave_one_out import LeaveOneOutTrainer, leave_one_out_objective
from shared.trainers.online_config import OnlineConfig
from shared.trainers.reference_checks import check_reference_used
from shared.trainers.rewarding import check_best_metric, refuse_unknown, rewards_of, tell_doubts
from shared.trainers.token_policy_gradient import TokenPolicyGradientTrainer, objective_of
from shared.trainers.token_rollouts import engine_of, sampling_of, token_parts
from textalign.config import TextConfig
from textalign.online_options import GRPOOptions, RLOOOptions
from textalign.preparing import TextRun, load_text_model
from textalign.prompting import prepare_prompts
from textalign.referenced import TextReference


@dataclass
class GRPOConfig(OnlineConfig, GRPOOptions, TextConfig):
    """Options of GRPOTrainer: GRPOOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "grpo"


@dataclass
class RLOOConfig(OnlineConfig, RLOOOptions, TextConfig):
    """Options of RLOOTrainer: RLOOOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "rloo"

    def _check_options(self) -> None:
        super()._check_options()
        bounds = self.reward_clip_range
        if bounds is None:
            return
        numbers = all(isinstance(bound, Real) and not math.isnan(bound) for bound in bounds)
        if len(bounds) != 2 or not numbers or bounds[0] >= bounds[1]:
            raise UserError(f"reward_clip_range {bounds}: give two numbers, the least reward and the greatest.")


class RewardedText(TextReference):
    """What a text trainer that is rewarded for what it writes adds to a policy-gradient trainer.

    Args:
        model: hub id, folder or built-in name, or a loaded model (a PEFT model too).
        reward_funcs: one reward or several: functions `f(prompts, completions, **columns) -> list of numbers` (async
            ones too), built-in names, dotted paths, reward models or their names, see shared.rewards.loading;
            `args.reward_funcs` where None.
        args: options; the defaults where None.
        train_dataset: rows with a `prompt`, a text or a list of messages; their other columns go to the rewards.
        eval_dataset: held-out rows of the same kind, or several sets by name.
        processing_class: the tokenizer; the model's own where None.
        reward_processing_classes: tokenizers of reward models that are given as such, one a reward.
        callbacks, optimizers: as transformers.Trainer.
        quantization_config: as `from_pretrained`, where the model is given by name.
        peft_config: puts this adapter on the model; a folder or hub id of an adapter goes on training that one.
        ref_model: the reference that β holds the policy near to: a model or its name; `args.ref_model_name_or_path`
            where None. Without either it is the model as it is at the start.

    Raises:
        UserError: options that cannot be followed; rewards that are not known; a model none of whose weights is
            trained.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.
    """

    config_class: ClassVar[type]
    run: TextRun

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        reward_funcs: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        ref_model: str | PreTrainedModel | nn.Module | None = None,
        **unknown: Any,
    ):
        refuse_unknown(type(self).__name__, unknown)
        args = self.config_class.of(args)
        objective = self.objective_of(args)
        check_reference_used(args, ref_model)
        if args.beta:
            self.take_reference(model, ref_model, args, train_dataset=train_dataset, peft_config=peft_config)
        self.run, encoder = prepare_prompts(
            model,
            args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
        )
        run = self.run
        engine = engine_of(args, run.tokenizer)
        rewards: RewardSet = rewards_of(
            reward_funcs,
            args,
            run.train,
            processing_classes=reward_processing_classes,
            policy=(model, peft_config is not None or hasattr(model, "peft_config")),
        )
        tell_doubts(args, len(rewards.names))
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
            objective=objective,
            train_dataset=run.train,
            eval_dataset=run.held_out,
            processing_class=run.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            ref_model=self.reference_given,
        )
        self.row_notes = dict(run.left_out)

    def objective_of(self, args: Any) -> PolicyGradient:
        """The loss that the options ask for. Bad options are told here, before all else."""
        raise NotImplementedError

    def title(self) -> str:
        return f"{type(self).__name__.removesuffix('Trainer')}: {self.run.model_name}"


class TextPolicyGradientTrainer(RewardedText, TokenPolicyGradientTrainer):
    """Base of the text trainers that compare the samples of a prompt. Arguments as RewardedText."""


class GRPOTrainer(TextPolicyGradientTrainer):
    """Group relative policy optimisation and its family on text.

    Shao et al. 2024, arXiv:2402.03300; `args.recipe` names presets of the others. Arguments as
    RewardedText. Another rule for advantages: override `advantages`.

    Example:
        >>> trainer = GRPOTrainer("Qwen/Qwen3-0.6B", "accuracy_reward", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    config_class = GRPOConfig

    def objective_of(self, args: GRPOConfig) -> PolicyGradient:
        return objective_of(args, max_actions=sampling_of(args)["train"].max_new_tokens)


class RLOOTrainer(LeaveOneOutTrainer, TextPolicyGradientTrainer):
    """REINFORCE leave-one-out on text (Ahmadian et al. 2024, arXiv:2402.14740).

    The ratio is that of whole completions. Arguments as RewardedText.
    """

    config_class = RLOOConfig

    def objective_of(self, args: RLOOConfig) -> PolicyGradient:
        sampling_of(args)
        return leave_one_out_objective(args)
