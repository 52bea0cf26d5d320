"""How large, and in how many pieces, images are seen: options of every vision-language trainer. Imports no torch.

What of it a family of models can follow is its row in families.py, `pixels`. Deliberately not here: videos (video.py),
and `max_pixels`'s work, which is done where images are decoded, for all families alike.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.errors import UserError
from shared.runtime.arguments import AlignOptions
from shared.runtime.options import option
from visionalign.families import FAMILIES, Family

if TYPE_CHECKING:
    from transformers import ProcessorMixin

OWN = ("min_pixels", "image_longest_edge", "image_splitting")  # not every family has them
# What from_pretrained itself takes besides the parts' own arguments.
_LOADING = {"cache_dir", "force_download", "local_files_only", "token", "subfolder", "use_fast", "backend"}
_TOKENIZER = {"padding_side", "truncation_side", "model_max_length", "extra_special_tokens", "chat_template"}
_TOKENIZER |= {f"{name}_token" for name in ("bos", "eos", "pad", "unk")}


@dataclass
class ImageOptions(AlignOptions):
    """How large, and in how many pieces, images are seen. Unset: as the model's processor says."""

    max_pixels: int | None = option(None, "Scale images with more pixels down to this many, keeping their shape.")
    min_pixels: int | None = option(None, "Scale images with fewer pixels up to this many (Qwen-VL).")
    image_longest_edge: int | None = option(
        None, "Scale images until their longer edge has so many pixels, before they are split (Idefics 3, SmolVLM)."
    )
    image_splitting: bool | None = option(
        None,
        "Show large images in pieces besides as a whole: more detail, for several times the tokens (Idefics 3, "
        "SmolVLM; the pan and scan of Gemma 3).",
    )
    processor_kwargs: dict[str, Any] | None = option(
        None, "Further arguments of the processor's from_pretrained, as JSON."
    )


def check_image_options(args: Any, family: Family) -> None:
    """Raise UserError for options that cannot be followed by a model of the family.

    Args:
        args: the trainer's; one without these options is taken as it is.
        family: the model's.
    """
    for name in ("max_pixels", *OWN):
        value = getattr(args, name, None)
        if value is None:
            continue
        if name != "image_splitting" and value < 1:
            raise UserError(f"{name} {value}: must be at least 1.")
        if name in OWN and name not in family.pixels:
            able = [other.name for other in FAMILIES.values() if name in other.pixels]
            own = ", ".join(["max_pixels", *family.pixels])
            raise UserError(
                f"{name}: models of the family {family.name} have no such option, only {', '.join(able)}. "
                f"This model takes {own}, and processor_kwargs for what is its image processor's alone."
            )
    least, most = (getattr(args, name, None) for name in ("min_pixels", "max_pixels"))
    if least and most and least > most:
        raise UserError(f"min_pixels {least} is more than max_pixels {most}.")


def check_processor_kwargs(given: dict[str, Any], processor: ProcessorMixin) -> None:
    """Raise UserError for arguments that no part of the processor knows: `from_pretrained` passes over them."""
    parts = [getattr(processor, part, None) for part in ("image_processor", "video_processor")]
    media = [set(type(part).valid_kwargs.__annotations__) for part in parts if part is not None]
    known = _LOADING | _TOKENIZER | set().union(*media)
    known |= set(inspect.signature(type(processor).__init__).parameters)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UserError(
            f"processor_kwargs: {', '.join(unknown)} is no argument of a {type(processor).__name__}. Those of its "
            f"images are {', '.join(sorted(media[0]))}."
        )


def with_image_options(processor: ProcessorMixin, args: Any, family: Family) -> ProcessorMixin:
    """The processor as the options ask; the one given stays as it was.

    Args:
        processor: the model's.
        args, family: as `check_image_options` has passed.

    Raises:
        UserError: images in more pieces than the model has words for, or larger than its image processor makes any.
    """
    asked = {name: getattr(args, name, None) for name in family.pixels}
    if all(value is None for value in asked.values()):
        return processor
    processor = copy.copy(processor)
    images = processor.image_processor = copy.deepcopy(processor.image_processor)
    for name, value in asked.items():
        if value is None:
            continue
        attribute, _, entry = family.pixels[name].partition(".")
        if entry:
            value = type(images.size)(**{**dict(images.size), entry: value})
        setattr(images, attribute, value)
        if attribute in getattr(processor, "images_kwargs", {}):  # they go before the image processor's own
            processor.images_kwargs = {**processor.images_kwargs, attribute: value}
    least, most = (images.size.get(f"{edge}_edge") for edge in ("shortest", "longest"))
    if asked.get("min_pixels") and most and least > most:
        limits = json.dumps({"size": {"shortest_edge": least, "longest_edge": least}})
        raise UserError(
            f"min_pixels {least} is more than the {most} that the model's image processor makes of any image. Give "
            f"{most} at most, or raise that limit: --processor_kwargs '{limits}'."
        )
    if getattr(images, "max_image_size", None) and images.do_image_splitting:
        _check_pieces(processor)
    return processor


def _check_pieces(processor: ProcessorMixin) -> None:
    images = processor.image_processor
    edge, piece = images.size["longest_edge"], images.max_image_size["longest_edge"]
    pieces = math.ceil(edge / piece)
    words = processor.tokenizer.get_vocab()
    if pieces > 1 and f"<row_{pieces}_col_{pieces}>" not in words:
        most = next(count for count in range(pieces - 1, 0, -1) if count == 1 or f"<row_{count}_col_{count}>" in words)
        raise UserError(
            f"image_longest_edge {edge}: makes {pieces} pieces of {piece} pixels a side, and the model has words for "
            f"{most}. Give {most * piece} at most, or image_splitting false."
        )
