"""Rewards of images by a model: CLIP score, aesthetic score, PickScore, HPSv2 and ImageReward.

All are differentiable: the model is frozen, and the gradient goes through it, and through the resizing of its own
image processor, to the images. Weights are read from safetensors alone. Deliberately not here: reward models of
vision-language models (visionalign.rewards), judges that answer in words (judges.py), and text in images (ocr.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from shared.errors import UserError
from shared.hub import require_available
from shared.rewards.base import text_of
from shared.rewards.linear_heads import NO_PICKLE, linear_head
from shared.rewards.models import HUB_OPTIONS, ModelReward
from shared.rewards.pictures import to_tensor, within


class ImageModel(ModelReward):
    """Base of the models that score images, with a gradient to them.

    Args:
        model: hub id, folder or built-in name, or a loaded model.
        processor: the model's; loaded beside a model that is given by name, or from another place that is named.
        batch_size: images that are scored at once.
        device: where a model that is given by name is put; None: the accelerator that is current at the first call.
        options: more for `from_pretrained`, such as `dtype="bfloat16"` or `revision`. Scores are float32 in any case.

    Raises:
        UserError: the model cannot be loaded, has no weights as safetensors, or lacks some.
    """

    needs = "processor"
    differentiable = True
    kind = "CLIPModel"  # class of transformers
    auto = "AutoProcessor"
    label: str  # how it is called in logs

    def __init__(
        self,
        model: str | nn.Module,
        processor: Any = None,
        *,
        batch_size: int = 16,
        device: torch.device | str | None = None,
        **options: Any,
    ):
        super().__init__(model, processor, batch_size=batch_size, device=device, options=options)
        self.model.requires_grad_(False)
        self.__name__ = self.label

    def load(self, name: str, processor: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
        import transformers

        hub = {key: options[key] for key in HUB_OPTIONS if key in options}
        require_available(name, file="config.json", what="reward model", revision=options.get("revision"))
        with _loading(name, self.kind):
            if processor is None:
                processor = getattr(transformers, self.auto).from_pretrained(name, **hub)
            elif isinstance(processor, str):
                processor = getattr(transformers, self.auto).from_pretrained(processor)
            model, told = getattr(transformers, self.kind).from_pretrained(
                name, use_safetensors=True, output_loading_info=True, **{"dtype": "auto", **options}
            )
        missing = sorted(told["missing_keys"])
        if missing:
            raise UserError(
                f"{name} is no whole {self.kind}: {len(missing)} of its weights are missing, such as {missing[0]}."
            )
        return model, processor

    def __call__(self, images: Tensor | Sequence[Any], prompts: Sequence[Any], **columns: Any) -> Tensor:
        """Scores `(B,)` of images.

        Args:
            images: `(B, 3, H, W)` in [0, 1], or a list of such tensors or PIL images of any sizes.
            prompts: B strings, or lists of messages, whose text counts.
            columns: the rows' other columns; not looked at.
        """
        self.place()
        asked = [text_of(prompt) for prompt in prompts]
        starts = range(0, len(asked), self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        return torch.cat([self.score(self.pixels(images[part]), asked[part]).float() for part in parts])

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """The scores `(b,)` of pixel values as the model takes them."""
        raise NotImplementedError

    def pixels(self, images: Tensor | Sequence[Any]) -> Tensor:
        """Images resized, cut and normalised by the model's image processor, `(b, 3, h, w)`, with their gradient."""
        device = next(self.model.parameters()).device
        shown = [within(to_tensor(image).to(device)) for image in images]
        processor = getattr(self.processor, "image_processor", self.processor)
        found = processor(images=shown, do_rescale=False, return_tensors="pt")["pixel_values"]
        return found.to(device, self.model.dtype)

    def words(self, prompts: Sequence[str], longest: int) -> dict[str, Tensor]:
        """Tokens of prompts, cut at `longest`."""
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        found = tokenizer(list(prompts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        device = next(self.model.parameters()).device
        return {name: found[name].to(device) for name in ("input_ids", "attention_mask")}


class CLIPScore(ImageModel):
    """How well images fit their prompts: the cosine between CLIP's embeddings, times 100.

    Not cut off at 0, as some have it, so that there is a gradient everywhere. Prompts are cut at what the model takes.

    Args:
        model: hub id, folder or built-in name of a CLIP model, or a loaded one.
        scale: by which the cosine is multiplied; None: by the model's own logit scale, which makes the score
            transformers' `logits_per_image`.
        processor, batch_size, device, options: see ImageModel.

    Paper: CLIPScore (Hessel et al. 2021).

    Example:
        >>> reward = CLIPScore("openai/clip-vit-large-patch14", dtype="bfloat16")  # doctest: +SKIP
        >>> reward(images, ["a red circle"] * len(images))  # doctest: +SKIP
        tensor([24.1, 19.7])
    """

    label = "clip"

    def __init__(
        self,
        model: str | nn.Module = "openai/clip-vit-large-patch14",
        processor: Any = None,
        *,
        scale: float | None = 100.0,
        **options: Any,
    ):
        super().__init__(model, processor, **options)
        self.scale = scale

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        longest = self.model.config.text_config.max_position_embeddings
        each = list(dict.fromkeys(prompts))
        texts = self.model.get_text_features(**self.words(each, longest)).pooler_output.float()
        texts = texts[[each.index(prompt) for prompt in prompts]]
        images = self.model.get_image_features(pixel_values=pixels).pooler_output.float()
        cosine = (normalize(images, dim=-1) * normalize(texts, dim=-1)).sum(-1)
        return cosine * (self.model.logit_scale.float().exp() if self.scale is None else self.scale)


class PickScore(CLIPScore):
    """What people preferred among images of one prompt: a CLIP-H trained on their choices, with its logit scale.

    Args:
        model: hub id or folder, or a loaded CLIP model.
        processor, scale, batch_size, device, options: see CLIPScore.

    Paper: Pick-a-Pic (Kirstain et al. 2023).
    """

    label = "pickscore"

    def __init__(
        self,
        model: str | nn.Module = "yuvalkirstain/PickScore_v1",
        processor: Any = None,
        *,
        scale: float | None = None,
        **options: Any,
    ):
        super().__init__(model, processor, scale=scale, **options)


class HPSv2(CLIPScore):
    """Human preference score: a CLIP-H trained on rankings of images, its cosine (about .2 to .3) as it is.

    Args:
        model: hub id or folder in transformers' format, or a loaded CLIP model.
        processor, scale, batch_size, device, options: see CLIPScore.

    Paper: Human Preference Score v2 (Wu et al. 2023).
    """

    label = "hpsv2"

    def __init__(
        self,
        model: str | nn.Module = "adams-story/HPSv2-hf",
        processor: Any = None,
        *,
        scale: float | None = 1.0,
        **options: Any,
    ):
        super().__init__(model, processor, scale=scale, **options)


class AestheticScore(ImageModel):
    """How pleasing images are, about 1 to 10, whatever their prompts: linear layers on CLIP's image embedding.

    Args:
        model: hub id or folder of a CLIP model (ViT-L/14 for the public heads), whole or its half that sees; or a
            loaded `CLIPVisionModelWithProjection`.
        head: the linear layers, a safetensors file, a folder with one, `owner/name` or `owner/name/file.safetensors`;
            None: they are among the model's own weights. The public predictors have one layer (LAION's first) or five
            with nothing between them (its second, "sac+logos+ava1").
        processor, batch_size, device, options: see ImageModel.

    Raises:
        UserError: the head cannot be read, or does not fit the embedding.

    Source: LAION-AI/aesthetic-predictor, christophschuhmann/improved-aesthetic-predictor.
    """

    label = "aesthetic"
    kind, auto = "CLIPVisionModelWithProjection", "AutoImageProcessor"

    def __init__(
        self,
        model: str | nn.Module = "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE",
        head: str | None = None,
        processor: Any = None,
        **options: Any,
    ):
        super().__init__(model, processor, **options)
        self.head = _head_of(model, head, self.model.config.projection_dim, options)

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        embedding = self.model(pixel_values=pixels).image_embeds.float()
        return self.head.to(pixels.device)(normalize(embedding, dim=-1))[:, 0]


class ImageRewardScore(ImageModel):
    """What people preferred, by a text encoder that looks at the image: linear layers on BLIP's first token.

    The public weights (THUDM/ImageReward) are a pickle, under names of their own. They serve once they are saved as a
    `BlipForImageTextRetrieval`, whose two encoders have the same parts, with the `mlp.layers` as the head.

    Args:
        model: folder or hub id of a `BlipForImageTextRetrieval`, or a loaded one.
        head: the linear layers, as of AestheticScore; None: `head.safetensors` in the model's folder.
        mean, std: of the raw scores, which are brought to 0 and 1; the defaults are those of ImageReward-v1.0.
        longest: tokens of a prompt.
        processor, batch_size, device, options: see ImageModel.

    Raises:
        UserError: the head cannot be read, or does not fit the encoder.

    Paper: ImageReward (Xu et al. 2023).
    """

    label = "imagereward"
    kind = "BlipForImageTextRetrieval"

    def __init__(
        self,
        model: str | nn.Module,
        head: str | None = None,
        processor: Any = None,
        *,
        mean: float = 0.16717362830052426,
        std: float = 1.0333394966054072,
        longest: int = 35,
        **options: Any,
    ):
        super().__init__(model, processor, **options)
        self.mean, self.std, self.longest = mean, std, longest
        self.head = _head_of(model, head, self.model.config.text_config.hidden_size, options, file="head.safetensors")

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = self.model.vision_model(pixel_values=pixels).last_hidden_state
        read = self.model.text_encoder(
            **self.words(prompts, self.longest),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
        ).last_hidden_state[:, 0]
        return (self.head.to(pixels.device)(read.float())[:, 0] - self.mean) / self.std


def _head_of(
    model: str | nn.Module, head: str | None, width: int, options: dict[str, Any], file: str = "model.safetensors"
) -> nn.Module:
    """The linear layers that are named, or that stand beside the model's weights."""
    if head is None and not isinstance(model, str):
        raise UserError("head is missing: name the file with the linear layers that give the score.")
    return linear_head(head or model, width, file=file, revision=None if head else options.get("revision"))


@contextlib.contextmanager
def _loading(name: str, kind: str) -> Iterator[None]:
    """Without a report on weights that the model has no part for, which those of whole models are to a half."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    except RuntimeError as error:  # weights of other shapes
        raise UserError(f"reward model {name!r} cannot be loaded: its weights are not those of a {kind}.") from error
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        if "safetensors" in reason or (Path(name).is_dir() and not any(Path(name).glob("*.safetensors"))):
            reason = NO_PICKLE
        raise UserError(f"reward model {name!r} cannot be loaded: {reason}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
