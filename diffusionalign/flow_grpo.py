"""Flow-GRPO: group-relative policy optimisation of flow matching (Liu et al. 2025, arXiv:2505.05470)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusionalign.denoising import DenoisingTrainer
from diffusionalign.denoising_config import DenoisingConfig
from diffusionalign.options import FlowGRPOOptions
from shared.trainers.config import AlignConfig


@dataclass
class FlowGRPOConfig(DenoisingConfig, FlowGRPOOptions, AlignConfig):
    """Options of FlowGRPOTrainer: FlowGRPOOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "flow_grpo"


class FlowGRPOTrainer(DenoisingTrainer):
    """Group-relative policy optimisation of pipelines that are trained by flow matching (SD3, Flux).

    Liu et al. 2025, arXiv:2505.05470. Noise is put into some steps of the sampler, sde or cps, whose log-probability
    the update is about; `window_size` leaves the others to a solver (Flow-GRPO-Fast, MixGRPO: arXiv:2507.21802).
    Arguments as DenoisingTrainer.
    """

    config_class = FlowGRPOConfig
