"""Options of preference optimisation on pictures, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffusionalign.options import DiffusionOptions
from shared.runtime.options import option
from shared.trainers.preference_options import PairLossOptions
from shared.trainers.reference_options import WholeReferenceOptions


@dataclass
class DiffusionDPOOptions(PairLossOptions, WholeReferenceOptions, DiffusionOptions):
    """Preference optimisation of diffusion models."""

    max_new_tokens: ClassVar[int | None] = None  # nothing is written here

    learning_rate: float = option(1e-5, "Peak learning rate of AdamW.")
    beta: float = option(
        5000.0,
        "Strength of the pull towards the reference: rewards are this times half of what is saved in mean squared "
        "error.",
    )
    loss_type: list[str] = option(
        ["sigmoid"],
        "Objective, or several that are added: sigmoid hinge ipo exo_pair nca_pair bco_pair robust sppo_hard aot "
        "aot_unpaired apo_zero apo_down discopop sft.",
    )
    reference_free: bool = option(False, "Compare the errors of the two pictures themselves; no reference is run.")
    timestep_sampling: Literal["uniform", "logit_normal"] = option(
        "uniform",
        "How levels of noise are drawn from those that the model was trained at: all alike, or more of those in the "
        "middle (Stable Diffusion 3).",
    )
    prompt_dropout: float = option(0.0, "Share of training pairs whose prompt is left empty, for guidance.")
    precompute_latents: bool = option(
        False,
        "Encode all pictures once, before training, and keep their latents on disk for this and later runs.",
    )
    eval_noise_draws: int = option(
        4, "Levels of noise, spread evenly, that the errors of a held-out pair are the mean of."
    )
    eval_answers: int = option(
        16, "How many held-out prompts are drawn before and after training where there are rewards; 0: none."
    )

    reward_funcs: list[str] = option(
        [],
        "Rewards that judge pictures drawn before and after training: a built-in name, package.module.function, or a "
        "reward model. Nothing is trained on them.",
    )
    reward_weights: list[float] | None = option(None, "Weight of each reward in their sum. Unset: 1 each.")
    on_reward_error: Literal["raise", "zero", "skip"] = option(
        "raise", "Where a reward fails: stop and say where, count it as 0, or as not applicable."
    )
    reward_timeout: float | None = option(None, "Seconds after which an asynchronous or remote reward has failed.")
    sample_every: int = option(
        100, "Steps between two columns of pictures in the run report, besides those before and after; 0: no pictures."
    )
    eval_sampler: Literal["same", "ode", "dpm"] = option(
        "ode", "How those pictures are drawn: by sampler, or without noise, as pipelines mostly do."
    )
