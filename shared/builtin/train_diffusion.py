"""Train the parts of the built-in text-to-image pipelines on drawn pictures; `make_diffusion` builds and writes them.

Plain loops: the picture encoder is trained first, then the denoiser and its text encoders together, for there is no
trained text encoder to start from. Nothing here aligns anything; later captions are wrong in part
on purpose.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from shared.builtin.pictures import Drawing, captions, drawings, paint

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline

PICTURES, VAE_PICTURES = 12_000, 16_000
BATCH, VAE_BATCH = 32, 64
WARMUP = 100  # steps
VAE_RATE, RATE = 2e-3, 1.5e-3
UNPROMPTED = 0.1  # share of the captions that are left empty, for classifier-free guidance
AVERAGED = 0.995  # decay of the moving average of the weights, which is what is kept
MOST_WEIGHT = 10.0  # of a step with much noise, relative to one without
KL = 1e-5
CHUNK = 250  # pictures encoded at once


class Round(NamedTuple):
    """A part of the training, whose rate rises and falls.

    Attributes:
        steps: of `BATCH` pictures with right captions. With wrong ones from the start, colours are learnt late.
        spoilt_steps: those after them, with captions that are wrong in part.
        wrong: share of these captions that name another colour.
    """

    steps: int
    spoilt_steps: int = 0
    wrong: float = 0.0


def pictures_of(drawings: Sequence[Drawing]) -> torch.Tensor:
    """Drawings as pixels (N, 3, 32, 32) in [-1, 1]."""
    return (
        torch.stack([torch.from_numpy(paint(each)) for each in drawings]).permute(0, 3, 1, 2).contiguous() / 127.5 - 1
    )


def train_vae(vae: AutoencoderKL, steps: int) -> None:
    """Train the autoencoder in place, then set what its latents are scaled by."""
    pictures = pictures_of(drawings(VAE_PICTURES))
    optimizer = _optimizer(vae.parameters(), VAE_RATE)
    schedule = _schedule(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    generator = torch.Generator().manual_seed(0)
    vae.train()
    for _ in range(steps):
        batch = pictures[torch.randint(len(pictures), (VAE_BATCH,), generator=generator)]
        latent = vae.encode(batch).latent_dist
        noise = torch.randn(latent.mean.shape, generator=generator)
        off = vae.decode(latent.mean + latent.std * noise).sample - batch
        loss = off.abs().mean() + off.square().mean() + KL * latent.kl().mean()
        _step(loss, vae, optimizer, schedule)
    vae.eval()
    vae.register_to_config(scaling_factor=round(1 / encode(vae, pictures).std().item(), 4))


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """The mean of the latents (N, 4, 8, 8), unscaled."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(CHUNK)])


def train_sd(pipeline: StableDiffusionPipeline, part: Round, seed: int) -> None:
    """Train UNet and text encoder of a Stable Diffusion pipeline in place, by the noise's mean squared error.

    It has more weight where there is much noise, as the error of a velocity would: colour and form are settled there.
    """
    alphas = pipeline.scheduler.alphas_cumprod
    weights = (1 / alphas).clamp(max=MOST_WEIGHT)
    weights /= weights.mean()

    def loss_of(
        models: nn.ModuleDict, latents: torch.Tensor, ids: torch.Tensor, draw: torch.Generator
    ) -> torch.Tensor:
        at = torch.randint(len(alphas), (len(latents),), generator=draw)
        noise = torch.randn(latents.shape, generator=draw)
        alpha = alphas[at][:, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        states = models["text_encoder"](ids).last_hidden_state
        off = (models["unet"](noisy, at, states).sample - noise).square().mean((1, 2, 3))
        return (off * weights[at]).mean()

    parts = {name: getattr(pipeline, name) for name in ("unet", "text_encoder")}
    _train_denoiser(pipeline, parts, loss_of, part, seed)


def train_sd3(pipeline: StableDiffusion3Pipeline, part: Round, seed: int) -> None:
    """Train transformer and text encoders of a Stable Diffusion 3 pipeline in place, by flow matching.

    Its T5 encoder only gives zeros, 256 of them if diffusers is not told otherwise. How many there are is varied, so
    that it makes no difference.
    """
    names = ("transformer", "text_encoder", "text_encoder_2")
    shift = pipeline.scheduler.config.shift

    def loss_of(
        models: nn.ModuleDict, latents: torch.Tensor, ids: torch.Tensor, draw: torch.Generator
    ) -> torch.Tensor:
        t = torch.randn(len(latents), generator=draw).sigmoid()
        t = shift * t / (1 + (shift - 1) * t)
        noise = torch.randn(latents.shape, generator=draw)
        noisy = torch.lerp(latents, noise, t[:, None, None, None])
        said = [models[name](ids, output_hidden_states=True) for name in names[1:]]
        states = torch.cat([each.hidden_states[-2] for each in said], dim=-1)
        (chance,) = torch.rand(1, generator=draw).tolist()
        zeros = ids.shape[1] if chance < 0.95 else 64 if chance < 0.985 else 256
        states = torch.cat([states, states.new_zeros(len(ids), zeros, states.shape[-1])], dim=1)
        pooled = torch.cat([each.text_embeds for each in said], dim=-1)
        velocity = models["transformer"](noisy, states, pooled, t * 1000).sample
        return F.mse_loss(velocity, noise - latents)

    _train_denoiser(pipeline, {name: getattr(pipeline, name) for name in names}, loss_of, part, seed)


def _train_denoiser(pipeline: Any, parts: dict[str, nn.Module], loss_of: Callable, part: Round, seed: int) -> None:
    models = nn.ModuleDict(parts).train()
    average = copy.deepcopy(models).requires_grad_(False)
    drawn, vae = drawings(PICTURES), pipeline.vae
    latents = (encode(vae, pictures_of(drawn)) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    right, spoilt = (pipeline_ids(pipeline, captions(drawn, wrong)) for wrong in (0.0, part.wrong))
    optimizer, total = _optimizer(models.parameters(), RATE), part.steps + part.spoilt_steps
    schedule = _schedule(optimizer, lambda step: min(1.0, 2.5 * (1 - step / total)))
    draw = torch.Generator().manual_seed(seed)
    for step, rows in enumerate(_batches(len(drawn), total, draw)):
        ids = (right if step < part.steps else spoilt)[rows]
        ids[torch.rand(len(rows), generator=draw) < UNPROMPTED] = pipeline_ids(pipeline, [""])
        _step(loss_of(models, latents[rows], ids, draw), models, optimizer, schedule)
        decay = min(AVERAGED, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in models.parameters()], 1 - decay)
    models.load_state_dict(average.state_dict())
    models.eval()


def pipeline_ids(pipeline: Any, texts: Sequence[str]) -> torch.Tensor:
    """Token ids (N, L) as the pipeline itself makes them."""
    tokenizer = pipeline.tokenizer
    encoded = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
    return torch.tensor(encoded["input_ids"])


def _batches(rows: int, steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(rows, generator=generator)
        batch, order = order[:BATCH], order[BATCH:]
        yield batch


def _optimizer(parameters: Iterator[nn.Parameter], rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)


def _schedule(optimizer: Any, falls: Callable[[int], float]) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / WARMUP) * falls(step))


def _step(loss: torch.Tensor, model: nn.Module, optimizer: Any, schedule: Any) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
