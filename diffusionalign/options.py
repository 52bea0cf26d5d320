"""Options of the trainers that draw pictures, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from shared.runtime.arguments import AlignOptions
from shared.runtime.options import option
from shared.trainers.online_options import GroupOptions, UpdateOptions


@dataclass
class DiffusionOptions(AlignOptions):
    """Drawing pictures."""

    max_new_tokens: ClassVar[int | None] = None  # nothing is written here

    eval_answers: int = option(
        16, "How many held-out prompts are drawn before and after training, for the report; 0: none."
    )
    model_init_kwargs: dict[str, Any] | None = option(
        None, "Further arguments of from_pretrained, as JSON, where the pipeline is given by name."
    )
    num_inference_steps: int = option(50, "T, denoising steps of a picture.")
    guidance_scale: float = option(
        5.0, "Classifier-free guidance, in sampling and in training alike; 1 or less: without. Flux: what it is told."
    )
    negative_prompt: list[str] | None = option(
        None,
        "What guidance leads away from: one text, or several, of which the prompts have one each in turn. A column "
        "negative_prompt of the data wins. Unset: the empty text.",
    )
    height: int | None = option(None, "Height of the pictures, in pixels. Unset: the pipeline's own.")
    width: int | None = option(None, "Width of the pictures, in pixels. Unset: the pipeline's own.")
    max_sequence_length: int | None = option(
        None, "Tokens that prompts are brought to for a T5 text encoder (SD3, Flux). Unset: the pipeline's own."
    )
    sampler: Literal["ddim", "sde", "cps", "ode", "dpm"] | None = option(
        None,
        "How a denoising step is drawn: ddim with noise by eta; sde (Flow-GRPO, flow matching alone) and cps "
        "(Flow-CPS) with noise by noise_level; ode and dpm without noise. Unset: what suits the pipeline.",
    )
    eta: float = option(1.0, "Noise of ddim: 0 none, 1 as much as in DDPM.")
    noise_level: float | None = option(None, "Noise of sde and cps. Unset: 0.7 and 0.8.")
    solver: Literal["ode", "dpm"] = option(
        "ode", "How steps without noise are taken: to first order, or by DPM-Solver++(2M)."
    )
    generation_rows: int | None = option(
        None, "Pictures that are drawn at once on each process. Unset: per_device_train_batch_size."
    )
    vae_slice: int | None = option(None, "Pictures that are decoded at once. Unset: generation_rows.")
    eval_num_inference_steps: int | None = option(None, "Denoising steps in evaluations. Unset: num_inference_steps.")
    eval_guidance_scale: float | None = option(None, "Guidance in evaluations. Unset: guidance_scale.")
    eval_sampler: Literal["same", "ode", "dpm"] = option(
        "same", "How evaluations draw: as training does, or without noise, as pipelines mostly do."
    )
    pass_reward: float | None = option(
        None, "A picture passes, for pass@k, when its reward reaches this. Unset: no pass@k."
    )


@dataclass
class RewardedOptions(DiffusionOptions, GroupOptions):
    """Pictures that are rewarded and learnt from."""

    advantages: Literal["group", "prompt", "batch"] = option(
        "group",
        "What a picture's reward is compared with: those of its prompt in this round; the last ones of its prompt, "
        "over rounds; all of this round.",
    )
    prompt_buffer_size: int = option(16, "Rewards that are remembered of each prompt. For advantages: prompt.")
    prompt_min_count: int = option(
        16, "Remembered rewards below which a prompt's are compared with the whole round. For advantages: prompt."
    )
    advantage_clip: float | None = option(5.0, "Advantages are held between minus this and this. none: not held.")
    same_initial_noise: bool = option(False, "Draw the pictures of a prompt in a round from one and the same noise.")
    pairs_at_once: int | None = option(
        None,
        "Pairs of a picture and a step that are learnt from in one pass of the model, gradients added up: bounds "
        "memory and changes nothing else. Unset: per_device_train_batch_size.",
    )


@dataclass
class DenoisingOptions(RewardedOptions, UpdateOptions):
    """Policy gradients whose actions are denoising steps."""

    learning_rate: float = option(3e-4, "Peak learning rate of AdamW.")
    beta: float = option(
        0.0,
        "Weight of the KL divergence of each step to that of the model without its adapter, or of a frozen copy where "
        "the whole model is trained.",
    )
    epsilon: float = option(
        1e-4,
        "ε, how far the ratio of a step may fall below 1, and rise above it; its log is the mean over the latent's "
        "numbers.",
    )
    scale_epsilon: bool = option(
        False,
        "Take ε to be of latents with 4 x 64 x 64 numbers, and multiply it for n numbers by the root of 16384 / n: "
        "such a mean scatters by so much more.",
    )
    train_timestep_fraction: float = option(
        1.0, "Share of the steps with noise that are learnt from; drawn anew for each round."
    )
    window_size: int | None = option(
        None, "How many steps in a row have noise and are learnt from; the solver takes the others. Unset: all."
    )
    window: Literal["fixed", "random", "moving"] = option(
        "fixed",
        "Where the window begins: at window_start; anywhere, drawn for each round (Flow-GRPO-Fast); or moving on from "
        "window_start by window_stride after every window_every steps (MixGRPO).",
        needs="window_size",
    )
    window_start: int = option(0, "First step of the window, or the first that may be.", needs="window_size")
    window_end: int | None = option(
        None, "Step before which the window must end. Unset: the end of the steps with noise.", needs="window_size"
    )
    window_every: int = option(25, "Optimizer steps between two moves of a moving window.", needs="window_size")
    window_stride: int = option(1, "Steps by which a moving window moves on.", needs="window_size")


@dataclass
class DDPOOptions(DenoisingOptions):
    """Denoising diffusion policy optimisation."""


@dataclass
class FlowGRPOOptions(DenoisingOptions):
    """Group-relative policy optimisation of flow matching."""

    num_inference_steps: int = option(10, "T, denoising steps of a picture in training.")
    eval_num_inference_steps: int | None = option(40, "Denoising steps in evaluations; none: num_inference_steps.")
    eval_sampler: Literal["same", "ode", "dpm"] = option(
        "ode", "How evaluations draw: as training does, or without noise, as pipelines mostly do."
    )
    guidance_scale: float = option(
        4.5, "Classifier-free guidance, in sampling and in training alike; 1 or less: without. Flux: what it is told."
    )
    beta: float = option(
        0.04,
        "Weight of the KL divergence of each step to that of the model without its adapter, or of a frozen copy where "
        "the whole model is trained.",
    )
