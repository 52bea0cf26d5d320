"""Stable Diffusion 1.x, 2.x and XL: a UNet that attends to the text, with noise or velocity prediction."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffusionalign.pipelines.base import Conditioning, PipelineAdapter
from shared.errors import UserError


class StableDiffusion(PipelineAdapter):
    """Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv:2112.10752)."""

    denoiser_name = "unet"

    def check(self) -> None:
        """As PipelineAdapter; UNets that were distilled to be told the guidance scale are refused too."""
        super().check()
        if self.denoiser.config.time_cond_proj_dim is not None:
            raise UserError(
                "the pipeline's unet is told the guidance scale (a consistency model, LCM), which is not supported: "
                "give the pipeline that it was distilled from."
            )

    @property
    def multiple(self) -> int:
        """Of the VAE's factor, and of the 8 pixels that these pipelines ask for whatever their VAE."""
        return math.lcm(8, self.pipeline.vae_scale_factor)

    @property
    def size(self) -> tuple[int, int]:
        """As the UNet was trained."""
        side = self.denoiser.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.pipeline.vae_scale_factor, width * self.pipeline.vae_scale_factor

    def encode(self, prompt: str | None) -> Conditioning:
        """`embeds` (1, L, D)."""
        embeds, _ = self.pipeline.encode_prompt([prompt or ""], self.device, 1, False)
        return {"embeds": embeds}

    def forward(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """As PipelineAdapter."""
        embeds = conditioning["embeds"].to(latents.dtype)
        added = {"added_cond_kwargs": self.added(conditioning, latents)} if "pooled" in conditioning else {}
        return model(latents, timesteps, encoder_hidden_states=embeds, return_dict=False, **added)[0]

    def added(self, conditioning: Conditioning, latents: Tensor) -> Conditioning:
        """What the UNet is told besides the text."""
        raise NotImplementedError


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952): two text encoders, and a picture's size and crop.

    Conditioning may have `time_ids` (N, 6): height and width of the original, top and left of the crop, height and
    width of the picture; without, a whole picture of the size of the latents.
    """

    vae_overflows = True

    def encode(self, prompt: str | None) -> Conditioning:
        """`embeds` (1, L, D) and `pooled` (1, D'); zeros for no prompt, where the pipeline is so configured."""
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            [prompt or ""], device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        told = {"embeds": embeds, "pooled": pooled.to(embeds.dtype)}
        if prompt is None and self.pipeline.config.force_zeros_for_empty_prompt:
            return {name: torch.zeros_like(value) for name, value in told.items()}
        return told

    def added(self, conditioning: Conditioning, latents: Tensor) -> Conditioning:
        """The pooled text and the numbers of the picture."""
        pooled = conditioning["pooled"].to(latents.dtype)
        height, width = (side * self.pipeline.vae_scale_factor for side in latents.shape[-2:])
        ids = conditioning.get("time_ids")
        if ids is None:
            ids = latents.new_tensor([[height, width, 0, 0, height, width]]).expand(len(latents), -1)
        return {"text_embeds": pooled, "time_ids": ids.to(latents)}
