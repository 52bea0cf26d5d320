"""PipelineAdapter: prompts, predictions, pictures and sizes of a diffusers pipeline, the same for all of them.

A pipeline's own file fills in what is its own: how prompts become tensors, how the denoiser is called, which sizes it
takes. What a prediction means for the next latents is not known here (`diffusionalign.steps`), nor how weights are
loaded or saved. Everything is computed as the pipeline's own call computes it, so that what is trained is what plain
diffusers shows.

Dimension letters: P prompts, N rows, C h w latents, H W pixels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from diffusionalign.schedules import Schedule, check_scheduler, schedule_of
from shared.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# of encoded prompts, kept on the device: 4 MB each for Flux in half precision
CACHE_BYTES = 512 * 2**20

Conditioning = dict[str, Tensor]


class PipelineAdapter:
    """A pipeline as the trainers use it.

    Args:
        pipeline: of diffusers, of a class that the adapter is for.
        max_sequence_length: tokens of a prompt for a T5 encoder; None: as many as the pipeline's own call takes.

    Raises:
        UserError: the pipeline cannot be trained here: its scheduler, or a denoiser that needs more than a prompt.
    """

    denoiser_name: ClassVar[str]
    guided: ClassVar[bool] = True  # by a second prediction; False: the denoiser is told the scale, or has none
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    vae_overflows: ClassVar[bool] = False  # in float16
    max_shift: ClassVar[float] = 1.15  # of flow levels, where the scheduler's configuration does not say it
    sequence_length: ClassVar[int | None] = None  # default of the pipeline's call

    def __init__(self, pipeline: DiffusionPipeline, *, max_sequence_length: int | None = None):
        check_scheduler(pipeline.scheduler)
        self.pipeline = pipeline
        self.denoiser: nn.Module = getattr(pipeline, self.denoiser_name)
        self.max_sequence_length = max_sequence_length or self.sequence_length
        self._encoded: OrderedDict[str | None, Conditioning] = OrderedDict()
        self.check()

    # ---- What a pipeline's own file fills in -----------------------------------------------------------------------

    def check(self) -> None:
        """Raise UserError where the pipeline's parts are not those of a text-to-image pipeline."""
        if (takes := self.channels) != (made := self.pipeline.vae.config.latent_channels):
            raise UserError(
                f"the pipeline's {self.denoiser_name} takes latents of {takes} channels, its VAE makes {made}: only "
                "text-to-image pipelines can be trained (none that also take a picture or a mask)."
            )

    def encode(self, prompt: str | None) -> Conditioning:
        """One prompt, (1, ...) each; None stands for no prompt at all."""
        raise NotImplementedError

    def forward(
        self, model: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """The denoiser's own answer for N rows, without classifier-free guidance; in any type."""
        raise NotImplementedError

    @property
    def channels(self) -> int:
        """Channels of the latents that the denoiser takes."""
        return self.denoiser.config.in_channels

    @property
    def multiple(self) -> int:
        """Height and width in pixels must be multiples of this."""
        return self.pipeline.vae_scale_factor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of pictures, in pixels, where none are asked for."""
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    def tokens(self, shape: tuple[int, int, int]) -> int | None:
        """Image tokens that the denoiser makes of latents of this shape, where the noise levels depend on them."""
        return None

    def flow_sigmas(self, steps: int) -> list[float] | None:
        """Flow levels before they are shifted, where the pipeline gives the scheduler its own."""
        return None

    # ---- Sizes and levels ------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The type of the denoiser's own weights, in which latents are kept between steps."""
        return next(self.denoiser.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture.

        Args:
            height, width: in pixels; None: the pipeline's own.

        Raises:
            UserError: VAE or denoiser do not take this size.
        """
        height, width = height or self.size[0], width or self.size[1]
        for name, side in (("height", height), ("width", width)):
            if side < 1 or side % self.multiple:
                below = max(side // self.multiple, 1) * self.multiple
                raise UserError(
                    f"{name}={side}: {type(self.pipeline).__name__} takes multiples of {self.multiple} pixels, for "
                    f"example {below} or {below + self.multiple}."
                )
        factor = self.pipeline.vae_scale_factor
        return self.channels, height // factor, width // factor

    def schedule(self, steps: int, height: int | None = None, width: int | None = None) -> Schedule:
        """The noise levels of a run of this many steps for pictures of this size, on the denoiser's device.

        Raises:
            UserError: as `latent_shape` and `diffusionalign.schedules.schedule_of`.
        """
        config = self.pipeline.scheduler.config
        tokens = self.tokens(self.latent_shape(height, width)) if config.get("use_dynamic_shifting") else None
        mu = None
        if tokens is not None:  # a straight line through (least tokens, base shift) and (most tokens, greatest shift)
            least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", self.max_shift)
            mu = low + (high - low) * (tokens - least) / (most - least)
        sigmas = self.flow_sigmas(steps)
        return schedule_of(self.pipeline.scheduler, steps, device=self.device, mu=mu, sigmas=sigmas)

    # ---- Prompts ---------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: Sequence[str | None]) -> Conditioning:
        """What the denoiser is told of prompts, by the frozen text encoders.

        A prompt is encoded by itself, and kept: what it becomes depends on no other prompt of its batch.

        Args:
            prompts: P texts; None: no prompt, which is what guidance goes away from where there is no negative one.

        Returns:
            Tensors of (P, ...), with no gradient.
        """
        found = [self._encode(prompt) for prompt in prompts]
        return {name: torch.cat([each[name] for each in found]) for name in found[0]}

    def _encode(self, prompt: str | None) -> Conditioning:
        if prompt not in self._encoded:
            # inference tensors could not be trained on later; autocast would depend on who asks first
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._encoded[prompt] = self.encode(prompt)
            size = sum(value.nbytes for value in self._encoded[prompt].values())
            while len(self._encoded) > max(1, CACHE_BYTES // size):
                self._encoded.popitem(last=False)
        self._encoded.move_to_end(prompt)
        return self._encoded[prompt]

    # ---- Denoising -------------------------------------------------------------------------------------------------

    def predict(
        self,
        model: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Conditioning,
        *,
        negative: Conditioning | None = None,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The denoiser's prediction, with guidance (Ho and Salimans 2022, arXiv:2207.12598) in one batch of 2 N rows.

        Args:
            model: the denoiser, as it is wrapped for training.
            latents: (N, C, h, w), any floating type.
            timesteps: (N,), what the denoiser is told of the noise; may differ from row to row.
            conditioning: from `encode_prompts`, (N, ...) each.
            negative: what guidance goes away from, (N, ...) or (1, ...) each; None: no prompt.
            guidance_scale: at most 1: no guidance, one batch of N. Flux is told it.

        Returns:
            (N, C, h, w) float32.
        """
        latents = latents.to(self.dtype)
        if not self.guided or guidance_scale <= 1:
            return self.forward(model, latents, timesteps, conditioning, guidance_scale).float()
        negative = {**conditioning, **(negative or self.encode_prompts([None]))}
        both = {name: torch.cat([negative[name].expand_as(told), told]) for name, told in conditioning.items()}
        latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
        away, towards = self.forward(model, latents, timesteps, both, guidance_scale).float().chunk(2)
        return away + guidance_scale * (towards - away)

    # ---- Pictures --------------------------------------------------------------------------------------------------

    @property
    def vae(self) -> nn.Module:
        """The VAE, in a type in which it does not overflow."""
        vae = self.pipeline.vae
        if self.vae_overflows and vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)
        return vae

    def decode(self, latents: Tensor, *, slice_size: int | None = None) -> Tensor:
        """The pictures of clean latents.

        Args:
            latents: (N, C, h, w), any floating type.
            slice_size: rows that the VAE takes at once; None: all.

        Returns:
            (N, 3, H, W) float32, clamped to [0, 1] where no gradient is asked for, with gradient and as they are
            where the latents have one.
        """
        vae = self.vae
        latents = self._scaled(latents.float(), back=True).to(vae.dtype)
        with torch.autocast(self.device.type, enabled=False):
            parts = [
                vae.decode(part, return_dict=False)[0].float() for part in latents.split(slice_size or len(latents))
            ]
        images = torch.cat(parts) / 2 + 0.5
        return images if images.requires_grad else images.clamp(0, 1)

    def encode_images(
        self,
        images: Tensor,
        *,
        random: torch.Generator | None = None,
        sample: bool = True,
        slice_size: int | None = None,
    ) -> Tensor:
        """The clean latents of pictures, by the VAE's encoder and without gradient.

        Args:
            images: (N, 3, H, W) in [0, 1].
            random: of the draw from what the encoder gives.
            sample: draw; otherwise its mean.
            slice_size: rows that the VAE takes at once; None: all.

        Returns:
            (N, C, h, w) float32, as they are when sampled.

        Raises:
            UserError: a size that the VAE or the denoiser does not take.
        """
        self.latent_shape(*images.shape[-2:])
        vae = self.vae
        images = (images.to(self.device) * 2 - 1).to(vae.dtype)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            found = [vae.encode(part).latent_dist for part in images.split(slice_size or len(images))]
        latents = torch.cat([each.mean for each in found]).float()
        if sample:
            device = latents.device if random is None else random.device
            noise = torch.randn(latents.shape, generator=random, device=device).to(latents.device)
            latents = latents + torch.cat([each.std for each in found]).float() * noise
        return self._scaled(latents)

    def _scaled(self, latents: Tensor, *, back: bool = False) -> Tensor:
        """The VAE's latents in the scale in which they are sampled, or `back`."""
        config: Any = self.pipeline.vae.config
        scale, shift = config.scaling_factor, config.get("shift_factor") or 0.0
        if (mean := config.get("latents_mean")) is not None and (std := config.get("latents_std")) is not None:
            shift, spread = (latents.new_tensor(each).view(1, -1, 1, 1) for each in (mean, std))
            scale = scale / spread
        return latents / scale + shift if back else (latents - shift) * scale
