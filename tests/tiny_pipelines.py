"""Tiny diffusers pipelines (20–150 k parameters) made from configuration: no network, no downloads.

`tiny_pipeline("sd")` gives one in memory, `build_pipeline("sd", directory)` writes it as `save_pretrained` does.
Pictures are 16 pixels a side, latents (4, 8, 8); Flux has no size of its own and is told it.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

SIZE = 16  # height and width of the pictures
TOKENS = 16  # of a prompt
HIDDEN = 16


def clip_tokenizer():
    """A CLIP tokenizer of letters alone."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=TOKENS)


def t5_tokenizer():
    """A T5 tokenizer of letters alone."""
    from transformers import T5TokenizerFast

    letters = [(letter, -3.0) for letter in string.printable.strip()]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    return T5TokenizerFast(vocab=[*special, *letters], extra_ids=0, model_max_length=TOKENS)


def _clip(tokenizer, *, projected: bool = False, layers: int = 1):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=HIDDEN,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5(tokenizer, width: int = HIDDEN):
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=HIDDEN, num_layers=1, num_heads=2)
    )


def _vae(channels: int = 4, **changed):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIZE,
        **changed,
    )


def _unet(**changed):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **{"cross_attention_dim": HIDDEN, **changed},
    )


def _ddim(**changed):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **changed,
    )


def _sd(**scheduler):
    from diffusers import StableDiffusionPipeline

    tokenizer = clip_tokenizer()
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=_ddim(**scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl():
    from diffusers import StableDiffusionXLPipeline

    tokenizer = clip_tokenizer()
    return StableDiffusionXLPipeline(
        vae=_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=_clip(tokenizer, layers=2),
        text_encoder_2=_clip(tokenizer, projected=True, layers=2),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=_unet(
            cross_attention_dim=2 * HIDDEN,
            transformer_layers_per_block=(1, 1),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=HIDDEN + 6 * 4,
        ),
        scheduler=_ddim(),
        add_watermarker=False,
    )


def _sd3():
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIZE // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=2 * HIDDEN,
            caption_projection_dim=16,
            pooled_projection_dim=2 * HIDDEN,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(tokenizer, projected=True, layers=2),
        tokenizer=tokenizer,
        text_encoder_2=_clip(tokenizer, projected=True, layers=2),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(t5, 2 * HIDDEN),
        tokenizer_3=t5,
    )


def _flux(**transformer):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, t5 = clip_tokenizer(), t5_tokenizer()
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            **{
                "patch_size": 1,
                "in_channels": 16,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": HIDDEN,
                "pooled_projection_dim": HIDDEN,
                "axes_dims_rope": (2, 2, 4),
                "guidance_embeds": True,
                **transformer,
            }
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.15),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(t5),
        tokenizer_2=t5,
    )


_BUILDERS: dict[str, Callable] = {
    "sd": _sd,
    "sd-v": lambda: _sd(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True),
    "sdxl": _sdxl,
    "sd3": _sd3,
    "flux": _flux,
    "flux-schnell": lambda: _flux(guidance_embeds=False),
}
PIPELINES = tuple(_BUILDERS)


def tiny_pipeline(kind: str, seed: int = 0):
    """A tiny pipeline of this kind (one of PIPELINES), in evaluation mode; its weights are drawn from `seed`."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = _BUILDERS[kind]()
        for name in ("unet", "transformer"):  # some of these are drawn as zeros, which would hide what goes through
            for parameter in getattr(pipeline, name, pipeline.vae).parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.05)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_pipeline(kind: str, directory: str | Path) -> Path:
    """Write a tiny pipeline to `directory` as `save_pretrained` does."""
    tiny_pipeline(kind).save_pretrained(directory)
    return Path(directory)
