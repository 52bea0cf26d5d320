"""DDPO: denoising diffusion policy optimisation (Black et al. 2023, arXiv:2305.13301)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusionalign.denoising import DenoisingTrainer
from diffusionalign.denoising_config import DenoisingConfig
from diffusionalign.options import DDPOOptions
from shared.trainers.config import AlignConfig


@dataclass
class DDPOConfig(DenoisingConfig, DDPOOptions, AlignConfig):
    """Options of DDPOTrainer: DDPOOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "ddpo"


class DDPOTrainer(DenoisingTrainer):
    """Denoising diffusion policy optimisation: the clipped ratio of each denoising step times its picture's advantage.

    Black et al. 2023, arXiv:2305.13301. Arguments as DenoisingTrainer.

    Example::

        trainer = DDPOTrainer("stabilityai/stable-diffusion-2-1", "aesthetic", train_dataset=["a cat"])
        trainer.train()
    """

    config_class = DDPOConfig
