"""PPO on text: a policy and a critic, which may be a model of its own, a head, or an adapter on the policy's base."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from shared.builtin import is_builtin
from shared.errors import UserError
from shared.objectives.policy_gradient import PolicyGradient
from shared.policies.critic import SeparateCritic
from shared.runtime.models import load_model
from shared.trainers.actor_critic import ActorCriticTrainer, actor_critic_objective
from shared.trainers.critics import (
    adapter_critic,
    check_adapter_critic,
    critic_like,
    critic_said,
    load_critic,
    saved_critic,
    separate_critic,
    shared_critic,
)
from shared.trainers.keeping import preserved_randomness
from shared.trainers.rewarding import refuse_unknown
from shared.trainers.score_heads import check_scorer, new_head_expected
from shared.trainers.token_rollouts import sampling_of
from textalign.policy_gradient import RewardedText
from textalign.ppo_config import PPOConfig
from textalign.ppo_steps import StepByStep
from textalign.preparing import fit_to_tokenizer, hub_options

__all__ = ["PPOConfig", "PPOTrainer"]


class PPOTrainer(StepByStep, RewardedText, ActorCriticTrainer):
    """Proximal policy optimisation on text (Schulman et al. 2017, arXiv:1707.06347; Ziegler et al. 2019,
    arXiv:1909.08593).

    `train()` samples, rewards and learns; with a loop of your own: `generate`, `step` and `dataloader`, see
    textalign.ppo_steps.

    Args:
        model, args, train_dataset, eval_dataset, processing_class, callbacks, optimizers, quantization_config,
            peft_config, ref_model: as RewardedText. Rows may hold the prompts' tokens, as `input_ids` without
            `prompt`. For a loop of your own the data set may be left out.
        reward_funcs, reward_processing_classes: as RewardedText.
        reward_model: one more reward, a model as a rule: TRL's name of the argument.
        value_model: what a separate critic is: a model with one score, trained in place, or a name;
            `args.value_model_name_or_path` where None. Without either it begins as the reward model, where one is
            given as `reward_model` or `reward_model_path`, or else as the policy.

    Raises:
        UserError: options that cannot be followed, rewards or models that are not known.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.

    Example:
        >>> trainer = PPOTrainer("Qwen/Qwen3-0.6B", reward_model="runs/reward", train_dataset=rows)  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """

    config_class = PPOConfig

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module = None,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
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
        reward_model: Any = None,
        value_model: str | PreTrainedModel | nn.Module | None = None,
        **unknown: Any,
    ):
        refuse_unknown(type(self).__name__, unknown)
        if model is None:
            raise UserError("model is missing: give the model to train, or its name.")
        args = self.config_class.of(args)
        source = args.reward_model_path if reward_model is None else reward_model
        self._choose_critic(model, args, value_model, source, peft_config)
        self._scoring = [source, *(reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs])]
        tokenizer, train, held_out = self.given_rows(model, args, processing_class, train_dataset, eval_dataset)
        if reward_model is None and reward_funcs is not None:  # in the place of the options, which have it among them
            reward_model = args.reward_model_path
        rewards, classes = self._rewards(reward_funcs, args, reward_model, reward_processing_classes, tokenizer)
        super().__init__(
            model,
            rewards,
            args,
            train,
            held_out,
            tokenizer,
            classes,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
            ref_model=ref_model,
        )

    def objective_of(self, args: PPOConfig) -> PolicyGradient:
        sampling_of(args)
        return actor_critic_objective(args)

    # ---- Rewards ---------------------------------------------------------------------------------------------------

    def _rewards(self, given: Any, args: PPOConfig, model: Any, classes: Any, tokenizer: Any) -> tuple[list, Any]:
        """All rewards, and their tokenizers; a model that was never saved is read by the policy's."""
        given = args.reward_funcs if given is None else given
        given = list(given) if isinstance(given, (list, tuple)) else [given]
        if model is None:
            return given or [self.without_reward()], classes
        classes = list(classes) if isinstance(classes, (list, tuple)) else [classes] * len(given)
        if len(classes) == len(given):  # that of the model is left out
            unsaved = isinstance(model, nn.Module) and not model.config._name_or_path
            classes.append(tokenizer if unsaved else None)
        return [*given, model], classes

    # ---- The critic ------------------------------------------------------------------------------------------------

    def _choose_critic(self, model: Any, args: PPOConfig, value_model: Any, reward_model: Any, peft_config: Any):
        """Settle kind and source of the critic; raises UserError where they do not go together."""
        named = args.value_model_name_or_path if value_model is None else value_model
        kind = args.value_model
        folders = [each for each in (peft_config, model) if isinstance(each, str)]
        self._critic_folder = next((each for each in folders if critic_said(each)), None)
        said = critic_said(self._critic_folder)
        if kind is None:
            kind = "separate" if named is not None else said.get("kind")
        rewarding = reward_model if _is_model(reward_model) else None
        kind = kind or ("separate" if rewarding is not None else "shared")
        if named is not None and kind != "separate":
            raise UserError(f"value_model {kind}: its critic is on the policy's base. Leave the value model out.")
        if named is not None or said.get("kind") != kind:
            self._critic_folder = None
        if kind == "adapter":
            check_adapter_critic(model, peft_config)
            parts = model.modules() if isinstance(model, nn.Module) else ()
            if args.gradient_checkpointing or any(getattr(part, "gradient_checkpointing", False) for part in parts):
                raise UserError(
                    "value_model adapter: layers that are run again in the backward pass would run with the policy's "
                    "adapter. Leave activation checkpointing out, or give value_model shared or separate."
                )
        named = rewarding if named is None and self._critic_folder is None else named
        if kind == "separate" and named is not None:
            check_scorer(named, "SEQ_CLS", 1, **(hub_options(args) if named is model else {}))
            if isinstance(named, nn.Module):
                SeparateCritic(named)
        self.critic_kind, self._critic_source = kind, named

    def make_critic(self) -> nn.Module:
        if self.critic_kind == "shared":
            return shared_critic(self.model)
        if self.critic_kind == "adapter":
            return adapter_critic(self.model, seed=self.args.seed)
        value_model = self._value_model()
        fit_to_tokenizer(value_model, self.run.tokenizer)
        return separate_critic(value_model, dropout=not self.args.disable_dropout)

    def _value_model(self) -> nn.Module:
        """What a separate critic is, or begins as."""
        source = self._critic_source
        if isinstance(source, nn.Module):
            return copy.deepcopy(source) if any(source is each for each in self._scoring) else source
        if self._critic_folder is not None and (config := critic_said(self._critic_folder).get("config")):
            return saved_critic(config)
        if source is None and (self.loaded_from is None or not hasattr(self.model, "peft_config")):
            return critic_like(self.model)
        init = {"attn_implementation": (self.args.model_init_kwargs or {}).get("attn_implementation")}
        with preserved_randomness(), new_head_expected(self.args.seed):
            set_seed(self.args.seed)
            name = source or self.loaded_from
            init |= hub_options(self.args) if name == self.loaded_from else {}
            return load_model(name, head="sequence-classification", num_labels=1, seed=self.args.seed, **init)

    def critic_attached(self) -> None:
        if self._critic_folder is None:
            return
        load_critic(self.model, Path(self._critic_folder))
        if self.args.should_log:
            print(f"The critic goes on from {self._critic_folder}.", flush=True)


def _is_model(reward: Any) -> bool:
    """Whether a reward is a model, or the name of one alone, that a critic can begin as."""
    if isinstance(reward, nn.Module):
        return True
    named = isinstance(reward, str) and ":" not in reward
    return named and (is_builtin(reward) or "/" in reward or Path(reward).is_dir())
