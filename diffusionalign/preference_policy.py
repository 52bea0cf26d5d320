"""What stands for log-probabilities in Diffusion-DPO: how well clean pictures are found again under noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffusionalign.pipelines.base import PipelineAdapter
from diffusionalign.preference_batches import PicturePairs
from diffusionalign.schedules import Schedule
from shared.objectives.denoising import denoising_log_probs, denoising_target
from shared.policies.base import LogProbs


class PairPolicy:
    """-½ the mean squared error of a denoiser's predictions of clean latents that were given noise.

    Args:
        adapter: the pipeline.
        levels: those that the denoiser is trained at; see diffusionalign.schedules.training_schedule.
        told_scale: the guidance scale that a denoiser is told which takes one (Flux). No second prediction is made.
    """

    def __init__(self, adapter: PipelineAdapter, levels: Schedule, *, told_scale: float = 1.0):
        self.adapter, self.levels = adapter, levels
        self.scale = 1.0 if adapter.guided else told_scale

    def around(self, model: nn.Module, *, share_prefix: bool = True) -> PairPolicy:
        """Itself: it keeps nothing of the model."""
        return self

    def log_probs(self, model: nn.Module, batch: PicturePairs, **unused: Any) -> LogProbs:
        """One value a row, `(2P, 1)`: the mean over its pair's draws of noise; 0 where the pair does not count.

        Args:
            model: the denoiser as the engine wraps it.
            batch: with latents, conditioning and noise.
        """
        draws = [self._of_draw(model, batch, draw) for draw in range(batch.at.shape[1])]
        logp = torch.stack(draws).mean(0)[:, None]
        mask = batch.action_mask
        return LogProbs(logp.masked_fill(mask == 0, 0), mask)

    def _of_draw(self, model: nn.Module, batch: PicturePairs, draw: int) -> Tensor:
        clean, levels = batch.latents.float(), self.levels
        noise, at = (each[:, draw].repeat_interleave(2, 0) for each in (batch.noise, batch.at))
        noisy = levels.noised(clean, at, noise)
        given = self.adapter.predict(model, noisy, levels.timesteps[at], batch.conditioning, guidance_scale=self.scale)
        target = denoising_target(levels.prediction, clean, noise, levels.alphas[at], levels.sigmas[at])
        return denoising_log_probs(given, target)
