"""Pictures of the run report: small, and written into the page as `data:` addresses; imports pillow when needed."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_SIDE = 256  # pixels of a thumbnail
VISIBLE_SIDE = 144  # a smaller picture is enlarged by a whole factor, up to this
LARGEST_PNG = 24_000  # bytes; a photograph beyond that is several times smaller as JPEG


@dataclass(frozen=True)
class Picture:
    """A thumbnail that is ready for the page, with the size in pixels of the picture that it was made of."""

    address: str
    width: int
    height: int

    @classmethod
    def of(cls, image: Image | Picture) -> Picture:
        """The thumbnail of `image`; a thumbnail is its own."""
        return image if isinstance(image, Picture) else cls(data_uri(image), image.width, image.height)

    def image(self) -> Image:
        """The thumbnail's pixels."""
        from PIL import Image

        return Image.open(io.BytesIO(base64.b64decode(self.address.partition(",")[2])))


def pictures_html(images: Sequence[Image | Picture]) -> str:
    """The pictures of one row, side by side."""
    shown = "".join(
        picture_html(image, f"image {place} of {len(images)}") for place, image in enumerate(images, start=1)
    )
    many = " many" if len(images) > 2 else ""
    return f'<div class="pictures{many}">{shown}</div>'


def picture_html(image: Image | Picture, what: str) -> str:
    """One picture; `what` it shows is for those who cannot see it."""
    picture = Picture.of(image)
    size = f"{picture.width}×{picture.height} pixels"
    return f'<img src="{picture.address}" alt="{escape(what)}, {size}" title="{size}">'


def to_plain(pictures: Any) -> Any:
    """Nested lists and dicts of pictures in JSON's types."""
    if isinstance(pictures, dict):
        return {name: to_plain(inner) for name, inner in pictures.items()}
    if isinstance(pictures, list):
        return [to_plain(inner) for inner in pictures]
    return asdict(Picture.of(pictures))


def from_plain(given: Any) -> Any:
    """The pictures that `to_plain` was given."""
    if isinstance(given, list):
        return [from_plain(inner) for inner in given]
    if given.keys() == {"address", "width", "height"}:
        return Picture(**given)
    return {name: from_plain(inner) for name, inner in given.items()}


def data_uri(image: Image) -> str:
    """`image` (PIL, any mode) as a `data:` address: at most 256 px a side, small ones enlarged unblurred."""
    from PIL import Image

    image = enlarged(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    data, kind = _encoded(image, "PNG", optimize=True), "png"
    if len(data) > LARGEST_PNG and image.mode == "RGB":
        data, kind = _encoded(image, "JPEG", quality=85), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def enlarged(image: Image) -> Image:
    """A copy of `image`; a small one is larger by a whole factor, unblurred."""
    from PIL import Image

    factor = max(1, VISIBLE_SIDE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _encoded(image: Image, encoding: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, encoding, **options)
    return file.getvalue()
