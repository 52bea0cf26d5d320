"""Options of the trainers with a value function (PPO), as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from shared.runtime.options import option
from shared.trainers.online_options import UpdateOptions

# other names of these options, all of them of TRL's PPO configurations -> the names here
ALIASES = {
    "num_ppo_epochs": "num_iterations",
    "ppo_epochs": "num_iterations",
    "kl_coef": "beta",
    "init_kl_coef": "beta",
    "kl_estimator": "kl_penalty",
    "cliprange": "epsilon",
    "response_length": "max_completion_length",
    "mini_batch_size": "per_device_train_batch_size",
}


@dataclass
class ActorCriticOptions(UpdateOptions):
    """Proximal policy optimisation with a value function."""

    aliases: ClassVar[dict[str, str]] = ALIASES

    learning_rate: float = option(3e-6, "Peak learning rate of AdamW.")
    num_generations: int = option(1, "Samples of each prompt in a round.")
    num_iterations: int = option(4, "Epochs of a round: how many times its samples are trained on (num_ppo_epochs).")
    num_mini_batches: int = option(
        1,
        "Optimizer steps of an epoch: a round has so many times the samples of one. steps_per_generation says so too.",
    )
    total_episodes: int | None = option(None, "Samples in all; says how long the run is, in the place of max_steps.")

    beta: float = option(
        0.05, "Weight of the divergence from the reference in each token's reward (kl_coef); 0 loads no reference."
    )
    kl_penalty: Literal["kl", "abs", "mse", "k3", "full", "k1", "k2"] = option(
        "kl",
        "How that divergence is measured at a token (kl_estimator): the log-ratio (kl, or k1), its size, half its "
        "square (mse, or k2), k3, or over the whole vocabulary (full).",
    )
    adap_kl_ctrl: bool = option(False, "Move beta so that the divergence of a sample stays near target.")
    target: float = option(6.0, "Divergence of a whole sample that is aimed at, in nats.", needs="adap_kl_ctrl")
    horizon: int = option(10_000, "Samples over which beta is changed by 20 % at most.", needs="adap_kl_ctrl")

    value_model: Literal["separate", "shared", "adapter"] | None = option(
        None,
        "The critic: a model of its own; a head on the policy's states; or a head and an adapter of its own on the "
        "policy's frozen base. Unset: separate where a value or reward model is named, else shared.",
    )
    value_model_name_or_path: str | None = option(
        None, "Model that a separate critic begins as. Unset: the reward model, or else the policy's."
    )
    value_learning_rate: float | None = option(None, "Learning rate of the critic. Unset: learning_rate.")
    vf_coef: float = option(0.1, "Weight of the value loss.")
    epsilon: float = option(0.2, "ε, how far the ratio of a token may fall below 1, and rise above it (cliprange).")
    cliprange_value: float | None = option(0.2, "How far a value may move from that of the round; none: anywhere.")
    gamma: float = option(1.0, "γ, what a reward is worth one token earlier.")
    lam: float = option(0.95, "λ of the advantages: 1 trusts the rewards to come alone, 0 the next value.")

    whiten_rewards: bool = option(False, "Divide a round's token rewards by their standard deviation.")
    whiten_advantages: bool = option(True, "Bring a round's advantages to mean 0 and standard deviation 1.")
    missing_eos_penalty: float | None = option(None, "Taken off the score of a sample that does not end.")
    use_score_scaling: bool = option(False, "Divide scores by their running standard deviation.")
    use_score_norm: bool = option(False, "Take their running mean off before.", needs="use_score_scaling")
    score_clip: float | None = option(None, "Greatest size of a score; what is beyond is clipped.")
    target_kl: float | None = option(
        None, "Go on to the next round where a step has moved the policy by more than 1.5 times this, in nats a token."
    )
    ratio_threshold: float | None = option(
        None, "Learn nothing from a step whose mean ratio to the policy that sampled is above this."
    )
