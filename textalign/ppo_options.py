"""Options of PPO on text, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from shared.runtime.options import option
from shared.trainers.actor_critic_options import ActorCriticOptions
from shared.trainers.reference_options import ReferenceModelOptions
from textalign.online_options import TextSamplingOptions


@dataclass
class PPOOptions(TextSamplingOptions, ActorCriticOptions, ReferenceModelOptions):
    """Proximal policy optimisation with a value function."""

    reward_model_path: str | None = option(
        None, "A reward model, besides reward_funcs; a separate critic begins as it where it is given no model."
    )
