"""Stable Diffusion 3 and Flux: transformers over image and text tokens, trained by flow matching."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusionalign.pipelines.base import Conditioning, PipelineAdapter
from shared.errors import UserError


class FlowTransformer(PipelineAdapter):
    """What the two have in common: adapters go on the attention of both kinds of tokens."""

    denoiser_name = "transformer"
    lora_targets = (
        *PipelineAdapter.lora_targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
    )  # fmt: skip
    patch = 2  # latents a side of an image token

    @property
    def multiple(self) -> int:
        """A patch of latents."""
        return self.pipeline.vae_scale_factor * self.patch

    def tokens(self, shape: tuple[int, int, int]) -> int:
        """One a patch."""
        return (shape[1] // self.patch) * (shape[2] // self.patch)


class StableDiffusion3(FlowTransformer):
    """Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206)."""

    sequence_length = 256
    max_shift = 1.16

    def __init__(self, pipeline: Any, *, max_sequence_length: int | None = None):
        if pipeline.text_encoder_3 is None and max_sequence_length is None:
            # zeros stand in the place of T5's tokens: as few as the model was trained with
            longest = (pipeline.tokenizer_3 or pipeline.tokenizer).model_max_length
            max_sequence_length = min(self.sequence_length, longest)
        super().__init__(pipeline, max_sequence_length=max_sequence_length)

    @property
    def patch(self) -> int:
        """As the transformer is configured."""
        return self.denoiser.config.patch_size

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """As PipelineAdapter; the table of positions has an end."""
        shape = super().latent_shape(height, width)
        most = self.denoiser.config.pos_embed_max_size
        if max(shape[1:]) > most * self.patch:
            pixels = most * self.multiple
            raise UserError(
                f"height={height}, width={width}: the transformer has positions for {pixels} pixels a side."
            )
        return shape

    def encode(self, prompt: str | None) -> Conditioning:
        """`embeds` (1, L, D) and `pooled` (1, D')."""
        text = [prompt or ""]
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            text,
            text,
            text,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return {"embeds": embeds, "pooled": pooled}

    def forward(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """As PipelineAdapter."""
        return model(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["embeds"].to(latents.dtype),
            pooled_projections=conditioning["pooled"].to(latents.dtype),
            return_dict=False,
        )[0]


class Flux(FlowTransformer):
    """Flux.1: no second prediction, the transformer is told the guidance scale where it was distilled to be.

    Its pipeline packs patches of 2 x 2 latents into tokens; latents are unpacked here but within `forward`.
    """

    guided = False
    sequence_length = 512

    @property
    def channels(self) -> int:
        """A token holds a patch."""
        return self.denoiser.config.in_channels // 4

    def flow_sigmas(self, steps: int) -> list[float]:
        """Evenly spaced, as the pipeline's call makes them."""
        return np.linspace(1.0, 1 / steps, steps).tolist()

    def encode(self, prompt: str | None) -> Conditioning:
        """`embeds` (1, L, D) and `pooled` (1, D')."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            [prompt or ""], device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"embeds": embeds, "pooled": pooled}

    def forward(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """As PipelineAdapter."""
        rows, channels, high, wide = latents.shape
        embeds = conditioning["embeds"].to(latents.dtype)
        placed = self.pipeline._prepare_latent_image_ids(rows, high // 2, wide // 2, latents.device, latents.dtype)
        told = None
        if self.denoiser.config.guidance_embeds:
            told = torch.full((rows,), guidance_scale, device=latents.device, dtype=torch.float32)
        packed = model(
            hidden_states=self.pipeline._pack_latents(latents.contiguous(), rows, channels, high, wide),
            timestep=timesteps.to(latents.dtype) / 1000,
            guidance=told,
            pooled_projections=conditioning["pooled"].to(latents.dtype),
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=placed,
            return_dict=False,
        )[0]
        pixels = (side * self.pipeline.vae_scale_factor for side in (high, wide))
        return self.pipeline._unpack_latents(packed, *pixels, self.pipeline.vae_scale_factor)
