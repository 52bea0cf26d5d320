"""The rewards of an online trainer, made of what it is given; and what its options are known to do wrong."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import Trainer

from shared.data.schema import column_names
from shared.errors import UserError
from shared.rewards.base import OF_IMAGES
from shared.rewards.combine import RewardSet
from shared.trainers.online import OnlineTrainer
from shared.trainers.online_evaluation import figure_names
from shared.trainers.recipes import doubtful
from shared.trainers.reward_adapter import AdapterReward

logger = logging.getLogger(__name__)

# arguments that other libraries' online trainers take -> what to do instead
NOT_TAKEN = {
    "tokenizer": "It is called processing_class.",
    "data_collator": "Leave it out: prompts are put together by the trainer.",
    "compute_metrics": "Leave it out: an evaluation has the rewards' means, and pass@k.",
    "tools": "Completions that call tools are not written here.",
    "environment_factory": "Completions that act in an environment are not written here.",
    "rollout_func": "Override the trainer's actor.",
    "model_init": "Give the model, or its name, as model.",
    "config": "It is called args.",
    "sd_pipeline": "It is called model.",
    "reward_model": "It is called reward_funcs.",
    "reward_processing_class": "It is called reward_processing_classes.",
    "reward_function": "It is called reward_funcs: functions f(images, prompts, **columns) that return the rewards.",
    "prompt_function": "Give it as train_dataset.",
    "image_samples_hook": "Leave it out: sample_every says how often pictures are drawn for the report and trackers.",
}
# what every reward function may take besides the data's columns
GIVEN = ("completion_ids", "trainer_state", "group_size", "mode", "log_extra", "log_metric")
GIVEN_WITH_IMAGES = (*(name for name in GIVEN if name != "completion_ids"), *sorted(OF_IMAGES))


def refuse_unknown(trainer: str, given: Mapping[str, Any]) -> None:
    """Raise UserError for arguments that a trainer does not take."""
    for name in given:
        known = NOT_TAKEN.get(name, "See its documentation for those that it takes.")
        raise UserError(f"{trainer} takes no argument {name}. {known}")


def rewards_of(
    given: Any,
    args: Any,
    rows: Any,
    *,
    processing_classes: Any = None,
    beside: Collection[str] = GIVEN,
    policy: tuple[Any, bool] | None = None,
) -> RewardSet:
    """The rewards, by the trainer's argument or, where that is None, by its options.

    Args:
        given: a reward or several; see shared.rewards.loading.load_reward.
        args: RolloutOptions.
        rows: the training rows, whose columns the functions may take.
        processing_classes: one a reward, or None.
        beside: what the functions may take besides; `GIVEN_WITH_IMAGES` where images are made.
        policy: the trainer's model or its name, and whether an adapter is trained on it; None: not known yet.

    Raises:
        UserError: there is no reward, it is not known, it takes a column that is not there, or the policy cannot carry
            it.
    """
    wanted = args.reward_funcs if given is None else given
    if isinstance(wanted, (list, tuple)) and not wanted:
        raise UserError(
            "There is no reward: give reward_funcs, functions or names such as accuracy_reward, or the folder of a "
            "reward model."
        )
    rewards = RewardSet(
        wanted,
        weights=args.reward_weights,
        on_error=args.on_reward_error,
        timeout=args.reward_timeout,
        processing_classes=processing_classes,
        device=args.device,
    )
    data = getattr(rows, "dataset", rows)
    columns = column_names(data) if hasattr(data, "__len__") else list(next(islice(iter(data), 1), {}))
    rewards.check({*columns, *beside})
    for reward in rewards.rewards if policy is not None else ():
        if isinstance(reward, AdapterReward):
            reward.check_policy(policy[0], args, has_adapter=policy[1])
    return rewards


def check_best_metric(
    trainer: OnlineTrainer, args: Any, rewards: Sequence[str], held_out: Any, *, unit: str = "token"
) -> None:
    """Say before any training what the first evaluation would say: that it has no metric of that name.

    Nothing is said of a trainer with an evaluation of its own.

    Args:
        rewards: their names.
        held_out: the held-out rows; several sets by name.
        unit: of an action; see shared.trainers.rollout.Actor.

    Raises:
        UserError: no evaluation has `metric_for_best_model`.
    """
    kind, name = type(trainer), args.metric_for_best_model
    own = kind.evaluate is not Trainer.evaluate or kind.evaluation_loop is not OnlineTrainer.evaluation_loop
    if name is None or own or args.eval_strategy == "no":
        return
    known = figure_names(args, rewards, unit)
    timed = ["runtime", "samples_per_second", "steps_per_second"]
    sets = list(held_out) if isinstance(held_out, dict) else []
    timed += [f"{each}_{metric}" for each in sets for metric in timed]
    known += [f"{each}_{metric}" for each in sets for metric in known]
    if name.removeprefix("eval_") not in {*known, *timed}:
        raise UserError(
            f"metric_for_best_model {name}: an evaluation has no such metric; there are: {', '.join(known)}."
        )


def tell_doubts(args: Any, rewards: int) -> None:
    """Warn of options that are known not to go together."""
    if hasattr(args, "loss_type") and args.should_log:
        for text in doubtful(args, rewards):
            logger.warning("%s", text)
