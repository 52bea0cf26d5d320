"""The images of a data set: kept encoded until used, then decoded to RGB. Nothing is fetched from the network.

Importing this module imports neither PIL nor datasets nor pyarrow.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

HEAD = 12  # of a file's bytes: so many tell what it is
_REMOTE = ("http://", "https://", "s3://", "gs://", "hf://", "ftp://")


def image_problem(raw: Any) -> str | None:
    """Why `raw` cannot be an image, judged without opening anything; None when it can be one."""
    if hasattr(raw, "convert"):
        return None
    return file_problem(raw, "image", "expected a PIL image, a path, bytes or {'bytes', 'path'}")


def file_problem(raw: Any, what: str, expected: str) -> str | None:
    """Why `raw` is no path, bytes or `{"bytes", "path"}` of a `what`; None when it is. Nothing is opened."""
    if isinstance(raw, Mapping):
        if raw.get("bytes") is not None:
            return None
        raw = raw.get("path")
        if raw is None:
            return f"the {what} has neither bytes nor a path"
    if isinstance(raw, str):
        if raw.startswith(_REMOTE):
            return (
                f"{what} {shorten(raw)!r} is a URL, and nothing is downloaded while training: download the files once "
                "and put their paths in the row"
            )
        return None if raw else f"the {what} path is empty"
    if isinstance(raw, (bytes, bytearray, os.PathLike)):
        return None
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what} is {type(raw).__name__}, {expected}"


def decode_image(
    raw: Any, *, row: int, max_pixels: int | None = None, base_dir: str | os.PathLike | None = None
) -> Image.Image:
    """Decode one image of a row completely.

    Args:
        raw: a PIL image, a path, encoded bytes, or `{"bytes": bytes | None, "path": str | None}`.
        row: the row's number, for the error.
        max_pixels: an image with more pixels (width x height) than this is made smaller, keeping its aspect.
        base_dir: the folder that a relative path starts from.

    Returns:
        An RGB `PIL.Image`: upright (EXIF orientation applied), transparency laid on white.

    Raises:
        DataError: missing file, URL, broken or truncated data, no pixels, or more pixels than PIL opens safely.
    """
    problem = image_problem(raw)
    if problem:
        raise DataError(f"row {row}: {problem}")
    name = _name(raw)
    try:
        image = _decode(raw, max_pixels, base_dir)
    # Broken data makes PIL's readers raise OSError, SyntaxError, ValueError, struct.error, zlib.error and others.
    except Exception as error:
        raise DataError(f"row {row}: {name} cannot be read: {_reason(error)}") from error
    if image is None:
        raise DataError(f"row {row}: {name} has no pixels")
    return image


def undecoded(dataset: Any) -> Any:
    """The same data set, its columns of images and videos, nested ones too, giving `{"bytes", "path"}` undecoded.

    No data is copied. A list of rows, and a stream whose columns are not known, are returned as they are.
    """
    features = getattr(dataset, "features", None)
    if features is None:
        return dataset
    from datasets import Dataset, Features

    plain = Features({name: _undecoded_feature(feature) for name, feature in features.items()})
    if plain == features:
        return dataset
    if not isinstance(dataset, Dataset):
        return dataset.decode(False)
    # `Dataset.cast` would rewrite the whole table for a list of images, though no stored byte differs.
    info = dataset.info.copy()
    info.features = plain
    return Dataset(dataset.data, info=info, split=dataset.split, indices_table=dataset._indices)


def _undecoded_feature(feature: Any) -> Any:
    from datasets import Image, LargeList, List, Video

    if isinstance(feature, (Image, Video)):
        return type(feature)(decode=False)
    if isinstance(feature, List):
        return List(_undecoded_feature(feature.feature), length=feature.length)
    if isinstance(feature, LargeList):
        return LargeList(_undecoded_feature(feature.feature))
    if isinstance(feature, dict):
        return {name: _undecoded_feature(inner) for name, inner in feature.items()}
    return feature


def iterate_light(dataset: Any, batch_size: int = 1000) -> Iterator[dict[str, Any]]:
    """The rows of an `undecoded` data set, of the bytes of their images none and of their videos' the first few.

    Checking the rows of 100,000 photographs must not read the photographs.
    """
    from datasets import Dataset, Image, List, Video

    if not isinstance(dataset, Dataset):
        yield from dataset
        return
    dataset = dataset.with_format(None)
    heavy = [
        name
        for name in ("image", "images", "video", "videos")
        if isinstance(getattr(dataset.features.get(name), "feature", dataset.features.get(name)), (Image, Video))
        and isinstance(dataset.features[name], (Image, Video, List))
    ]
    others = dataset.remove_columns(heavy)
    tables = dataset.select_columns(heavy).with_format("arrow") if heavy else None
    for start in range(0, len(dataset), batch_size):
        stop = min(start + batch_size, len(dataset))
        columns = others[start:stop]
        if tables is not None:
            table = tables[start:stop]
            for name in heavy:
                kept = HEAD if name.startswith("video") else 0
                columns[name] = _light(table[name].combine_chunks(), kept)
        names = list(columns)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def _light(array: Any, kept: int) -> list[Any]:
    """An arrow array of images or videos, or of lists of them, as Python values with so many of the bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_struct(array.type):
        names = [array.type.field(i).name for i in range(array.type.num_fields)]
        fields = dict(zip(names, array.flatten(), strict=True))
        heads = pc.binary_slice(fields["bytes"], 0, kept).to_pylist()
        files = zip(array.is_valid().to_pylist(), heads, fields["path"].to_pylist(), strict=True)
        return [{"bytes": head, "path": path} if there else None for there, head, path in files]
    items = iter(_light(array.flatten(), kept))
    lengths = pc.list_value_length(array).to_pylist()
    return [None if length is None else [next(items) for _ in range(length)] for length in lengths]


def _decode(raw: Any, max_pixels: int | None, base_dir: str | os.PathLike | None) -> Any:
    from PIL import Image, ImageOps

    if isinstance(raw, dict):
        raw = raw["bytes"] if raw.get("bytes") is not None else raw["path"]
    if hasattr(raw, "convert"):
        image = raw
    else:
        if not isinstance(raw, (bytes, bytearray)):
            # Whole, so that no file stays open behind an image that cannot be decoded.
            raw = Path(base_dir or "", raw).read_bytes()
        image = Image.open(io.BytesIO(raw))
        if max_pixels is not None and image.width * image.height > max_pixels:
            # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; never below the size asked for.
            image.draft("RGB", fitting(image.size, max_pixels))
    if 0 in image.size:
        return None
    image.load()
    if image.getexif().get(0x0112, 1) != 1:
        image = ImageOps.exif_transpose(image)
    image = _to_rgb(image)
    if max_pixels is not None and image.width * image.height > max_pixels:
        image = image.resize(fitting(image.size, max_pixels), Image.Resampling.BICUBIC)
    return image


def _to_rgb(image: Any) -> Any:
    from PIL import Image

    if image.mode.startswith("I;16"):
        # A plain conversion would clip 16-bit greys to white.
        return image.point(lambda grey: grey * (1 / 256), "L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(page, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def fitting(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """The largest (width, height) of the shape of `size` that has no more than `max_pixels`."""
    scale = math.sqrt(max_pixels / (size[0] * size[1]))
    return max(1, math.floor(size[0] * scale)), max(1, math.floor(size[1] * scale))


def _name(raw: Any) -> str:
    path = raw.get("path") if isinstance(raw, dict) else raw
    if isinstance(path, (str, os.PathLike)):
        return f"image {shorten(os.fspath(path))!r}"
    return "the image"


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return str(error) or type(error).__name__


def shorten(text: str, limit: int = 120) -> str:
    """`text`, its middle left out when it is longer than `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit // 2]}...{text[-limit // 2 :]}"
