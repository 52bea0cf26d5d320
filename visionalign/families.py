"""What differs between vision-language model families: one row each, and nothing about them anywhere else.

A new family is one row of FAMILIES; one that is not listed gets a row guessed from the names that most models use.
This module loads no model and reads no image; it imports neither torch nor transformers.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from shared.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, ProcessorMixin

logger = logging.getLogger(__name__)

PARTS = ("vision_tower", "projector", "language_model")

SAMPLE, SEEING, IMAGE, VIDEO = "sample", "seeing", "image", "video"
TILE, PATCH, TOKEN = "tile", "patch", "token"


@dataclass(frozen=True)
class Family:
    """What the suite has to know about a family of vision-language models.

    Attributes:
        name: the `model_type` of its configuration.
        vision_tower: attribute paths of the modules (or parameters) that see. No two parts share a parameter.
        projector: of those that map what is seen to the language model's width.
        language_model: of those that speak.
        index: for each tensor that the processor gives beside the token ids, what its first dimension counts:
            `sample`, `seeing` (samples with images), `image`, `video`, `tile`, `patch`, or `token` for
            `(samples, tokens, ...)`.
        structure: tokens that the processor or the template writes around images; never learnt.
        images_per_row: whether the processor wants its images as one list for each row rather than one flat list.
        expands_text: whether the processor writes an image's placeholders into the text and can say where.
        bos_in_text: whether the processor writes the beginning-of-sequence token into the text by itself.
        prefix_suffix: no chat template: the question is a prefix seen from both sides, the answer a suffix.
        text_only_rows: whether a row may have no image.
        image_at_ends: whether the processor loses rows without images at the ends of a batch.
        rows_apart: whether the model gives a row without image the same figures alone and beside rows with images.
        pixels: which of the options in image_options.py the image processor can follow: option -> its attribute, or
            `size.` and the entry of its size.
        video: whether the processor takes videos. The others drop them without a word.
        frames_as_images: whether a video is shown as its frames, an image each, where the processor takes none.
        sampling: which frames of a video are seen where nothing else is asked for, as fields of FrameSampling.
        equal_frames: whether the videos of a batch need equally many frames; in short ones frames are repeated.
        videos_alone: whether rows with videos have to be processed one by one: the processor lets videos take the
            place of images, and fills short videos up to the longest, in its words too.
        video_template: whether the processor takes a chat template of its own, DEFAULT_CHAT_TEMPLATE of its module, in
            place of the model's for rows with videos.
    """

    name: str
    vision_tower: tuple[str, ...] = ("model.vision_tower",)
    projector: tuple[str, ...] = ("model.multi_modal_projector",)
    language_model: tuple[str, ...] = ("model.language_model", "lm_head")
    index: dict[str, str] = field(default_factory=lambda: {"pixel_values": IMAGE})
    structure: tuple[str, ...] = ()
    images_per_row: bool = False
    expands_text: bool = True
    bos_in_text: bool = False
    prefix_suffix: bool = False
    text_only_rows: bool = True
    image_at_ends: bool = False
    rows_apart: bool = True
    pixels: dict[str, str] = field(default_factory=dict)
    video: bool = False
    frames_as_images: bool = False
    sampling: dict[str, float] = field(default_factory=lambda: {"num_frames": 8})
    equal_frames: bool = False
    videos_alone: bool = False
    video_template: bool = False
    known: bool = True

    @property
    def video_passes(self) -> bool:
        """Whether videos go through the vision tower in a call of their own."""
        return "pixel_values_videos" in self.index


_QWEN_TOWER = ("model.visual.patch_embed", "model.visual.pos_embed", "model.visual.blocks")  # the merger projects
_QWEN_STRUCTURE = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_PIXELS = {"min_pixels": "size.shortest_edge"}
_QWEN_INDEX = {
    "pixel_values": PATCH,
    "image_grid_thw": IMAGE,
    "mm_token_type_ids": TOKEN,
    "pixel_values_videos": PATCH,
    "video_grid_thw": VIDEO,
    "second_per_grid_ts": VIDEO,
}
# The limits of the models' own tools, in pixels of 28 x 28 to a token: 768 tokens a frame, 24,576 for all of them.
_QWEN_SAMPLING = {
    "fps": 2.0,
    "min_frames": 4,
    "max_frames": 768,
    "max_pixels": 768 * 28**2,
    "total_pixels": 24_576 * 28**2,
}
_IDEFICS_PARTS = {
    "vision_tower": ("model.vision_model",),
    "projector": ("model.connector",),
    "language_model": ("model.text_model", "lm_head"),
}
_IDEFICS_PIXELS = {"image_longest_edge": "size.longest_edge", "image_splitting": "do_image_splitting"}
_IDEFICS_STRUCTURE = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)

_QWEN2 = Family(
    "qwen2_vl",
    vision_tower=_QWEN_TOWER,
    projector=("model.visual.merger",),
    index=_QWEN_INDEX,
    structure=_QWEN_STRUCTURE,
    pixels=_QWEN_PIXELS,
    video=True,
    sampling=_QWEN_SAMPLING,
)
_LLAVA_NEXT = Family(
    "llava_next",
    projector=("model.multi_modal_projector", "model.image_newline"),
    index={"pixel_values": IMAGE, "image_sizes": IMAGE},
    structure=("<image>",),
    frames_as_images=True,
)
_LLAVA_NEXT_VIDEO = replace(
    _LLAVA_NEXT,
    name="llava_next_video",
    index={**_LLAVA_NEXT.index, "pixel_values_videos": VIDEO},
    structure=("<image>", "<video>"),
    video=True,
    frames_as_images=False,
    equal_frames=True,
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llava", structure=("<image>",), frames_as_images=True),
        _LLAVA_NEXT,
        _LLAVA_NEXT_VIDEO,
        replace(
            _LLAVA_NEXT_VIDEO,
            name="llava_onevision",
            index={**_LLAVA_NEXT_VIDEO.index, "batch_num_images": SEEING},
            images_per_row=True,
            sampling={"num_frames": 32},
        ),
        Family(
            "idefics3",
            **_IDEFICS_PARTS,
            index={"pixel_values": SAMPLE, "pixel_attention_mask": SAMPLE},
            structure=_IDEFICS_STRUCTURE,
            images_per_row=True,
            pixels=_IDEFICS_PIXELS,
            frames_as_images=True,
        ),
        Family(
            "smolvlm",
            **_IDEFICS_PARTS,
            index={"pixel_values": SAMPLE, "pixel_attention_mask": SAMPLE},
            structure=(*_IDEFICS_STRUCTURE, "<video>"),
            images_per_row=True,
            pixels=_IDEFICS_PIXELS,
            video=True,
            sampling={"fps": 1.0, "max_frames": 64},
            videos_alone=True,
            video_template=True,
        ),
        Family(
            "gemma3",
            index={"pixel_values": IMAGE, "token_type_ids": TOKEN},
            structure=("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
            images_per_row=True,
            pixels={"image_splitting": "do_pan_and_scan"},
            frames_as_images=True,
        ),
        _QWEN2,
        replace(_QWEN2, name="qwen2_5_vl"),
        Family(
            "qwen3_vl",
            vision_tower=_QWEN_TOWER,
            projector=("model.visual.merger", "model.visual.deepstack_merger_list"),
            index=_QWEN_INDEX,
            structure=_QWEN_STRUCTURE,
            pixels=_QWEN_PIXELS,
            video=True,
            sampling=_QWEN_SAMPLING,
        ),
        Family(
            "mllama",
            vision_tower=("model.vision_model",),
            index={
                "pixel_values": SAMPLE,
                "aspect_ratio_ids": SAMPLE,
                "aspect_ratio_mask": SAMPLE,
                "cross_attention_mask": TOKEN,
            },
            structure=("<|image|>",),
            images_per_row=True,
            frames_as_images=True,
            expands_text=False,
            bos_in_text=True,
            image_at_ends=True,
            rows_apart=False,
        ),
        Family(
            "paligemma",
            index={"pixel_values": IMAGE, "token_type_ids": TOKEN},
            structure=("<image>",),
            prefix_suffix=True,
            text_only_rows=False,
        ),
    )
}

_GUESS = {
    "vision_tower": ("model.vision_tower", "model.vision_model", "model.visual", "model.vision_encoder"),
    "projector": (
        "model.multi_modal_projector",
        "model.connector",
        "model.projector",
        "model.embed_vision",
        "model.aligner",
        "model.image_newline",
    ),
    "language_model": ("model.language_model", "model.text_model", "lm_head"),
}


def family_of(config: PretrainedConfig) -> Family:
    """The family that a model's configuration belongs to.

    Raises:
        UserError: the model has no vision part.
    """
    model_type = config.model_type
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if getattr(config, "vision_config", None) is None:
        raise UserError(
            f"The model is text-only (model type {model_type!r}): it cannot see images. Give a vision-language model, "
            f"for example of the types {', '.join(FAMILIES)}; text models are trained by textalign."
        )
    logger.warning(
        "Model type %r is not among the families that are tested (%s): its modules are guessed from their names.",
        model_type,
        ", ".join(FAMILIES),
    )
    video = getattr(config, "video_token_id", None) is not None
    return Family(model_type, **_GUESS, video=video, frames_as_images=not video, known=False)


def modules(model: nn.Module, part: str) -> list[nn.Module]:
    """The modules of a part of the model, one of PARTS; a PEFT model is seen through. See also `parameters`."""
    return [member for member in _members(model, part) if hasattr(member, "forward")]


def parameters(model: nn.Module, part: str) -> dict[str, nn.Parameter]:
    """The parameters of one part of the model by their names in `model`; also those outside any module of the part.

    Raises:
        UserError: no such part, or none that can be found in a model of an unknown family.
    """
    own: set[int] = set()
    for member in _members(model, part):
        own |= {id(p) for p in member.parameters()} if hasattr(member, "parameters") else {id(member)}
    if not own:
        raise UserError(
            f"The {part} of a {type(model).__name__} is not where other models have theirs, so it cannot be set apart."
        )
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def _members(model: nn.Module, part: str) -> list[Any]:
    if part not in PARTS:
        raise UserError(f"A vision-language model has no part {part!r}; its parts are {', '.join(PARTS)}.")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = (functools.reduce(lambda m, name: getattr(m, name, None), path.split("."), inner)
             for path in getattr(family_of(inner.config), part))  # fmt: skip
    return [member for member in found if member is not None]


def placeholder_ids(
    processor: ProcessorMixin, model_config: PretrainedConfig | None = None, *, family: Family | None = None
) -> set[int]:
    """Ids of the tokens that stand for images and videos or frame them: never learnt, and never to be generated."""
    if family is None:
        family = family_of(model_config) if model_config is not None else Family("")
    tokenizer = processor.tokenizer
    vocabulary = tokenizer.get_vocab()
    names = set(family.structure)
    for owner in (processor, tokenizer):
        names |= {getattr(owner, f"{kind}_token", None) for kind in ("image", "video", "boi", "eoi")}
    ids = {vocabulary[name] for name in names if name in vocabulary}
    for owner in (processor, tokenizer, model_config):
        for kind in ("image", "video", "boi", "eoi", "vision_start", "vision_end"):
            for suffix in ("token_id", "token_index"):
                value = getattr(owner, f"{kind}_{suffix}", None)
                if isinstance(value, int):
                    ids.add(value)
    return ids
