"""Tiny models that score images, saved as `save_pretrained` does: CLIP, its half that sees, and BLIP."""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from tiny import build_tokenizer

SIDE = 16  # pixels that the models see
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
}
VISION = {**{key: TEXT[key] for key in TEXT if key != "max_position_embeddings"}, "image_size": SIDE, "patch_size": 8}
BLIP_VISION = {**VISION, "initializer_range": 0.02}  # its own is 1e-10


def tokenizer():
    return build_tokenizer([], bos="<s>", eos="</s>", pad="<pad>")


def build_clip(folder):
    """A CLIP model with its processor; images go to 16 x 16 by their shorter edge."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    words = tokenizer()
    text = {**TEXT, "vocab_size": len(words), "eos_token_id": words.eos_token_id, "projection_dim": 12}
    config = CLIPConfig(text_config=text, vision_config={**VISION, "projection_dim": 12}, projection_dim=12)
    torch.manual_seed(0)
    loud(CLIPModel(config)).save_pretrained(folder)
    pixels = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(pixels, words).save_pretrained(folder)
    return folder


def build_blip(folder):
    """A BLIP model for matching with its processor, and a head of two layers."""
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipImageProcessor, BlipProcessor

    words = tokenizer()
    text = {**TEXT, "vocab_size": len(words), "encoder_hidden_size": 16, "pad_token_id": words.pad_token_id}
    config = BlipConfig(text_config=text, vision_config=BLIP_VISION, image_text_hidden_size=12)
    torch.manual_seed(0)
    loud(BlipForImageTextRetrieval(config)).save_pretrained(folder)
    BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), words).save_pretrained(folder)
    save_file(layers(16, 8, 1), folder / "head.safetensors")
    return folder


def layers(*widths, name="layers.", seed=1):
    """Linear layers as predictors are saved: every second number, as there is dropout between."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for at, (taken, given) in enumerate(zip(widths, widths[1:], strict=False)):
        state[f"{name}{2 * at}.weight"] = torch.randn(given, taken, generator=generator)
        state[f"{name}{2 * at}.bias"] = torch.randn(given, generator=generator)
    return state


def loud(model):
    """Weights that are larger than a fresh model's, so that scores differ from image to image."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(6)
    return model.eval()
