"""The videos of a data set: kept encoded until used, then the frames that a model is shown decoded to RGB.

Which frames those are and how large, `FrameSampling` says. Deliberately not here: how a file is opened and its frames
are found (video_decoders.py), and how decoded frames are kept on disk (frame_cache.py). Nothing is fetched from the
network, and importing this module imports no decoder, neither PIL nor numpy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.data.images import decode_image, file_problem, fitting, image_problem, shorten
from shared.errors import DataError, UserError

if TYPE_CHECKING:
    import numpy as np

    from shared.data.frame_cache import FrameCache
    from shared.data.video_decoders import Clip

DEFAULT_FPS = 2.0
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # a GIF may be a video
_FRAME_HEADS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM", b"II*\0", b"MM\0*")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".ogv")
_EXPECTED = "expected a path, bytes, {'bytes', 'path'}, a list of frames, or an array (frames, height, width, 3)"
_MOST_BYTES = 2**32  # of one video's frames in memory: more is a mistake, and would end the process


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video a model is shown, and how large. What is None (or 0) sets no limit.

    k frames are spread evenly: of n frames, number i is `int((i + 0.5) * n / k)`. A video of fewer than k frames gives
    each of its frames once.

    Args:
        num_frames: so many frames, whatever the video's length.
        fps: or so many frames for each second of the video; neither given: 2.
        min_frames: with fps, no fewer than these.
        max_frames: with fps, no more than these.
        max_pixels: of one frame; larger ones are made smaller, keeping their shape.
        total_pixels: of all frames together; frames are made smaller, never fewer, to stay within it.
        multiple_of: the number of frames is a multiple of this. With fps it is rounded, to more where the limits allow
            it; what is still missing, the last frame repeated makes up for.

    Raises:
        UserError: values that cannot go together, or below 1 (fps: not above 0).
    """

    num_frames: int | None = None
    fps: float | None = None
    min_frames: int = 1
    max_frames: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        for name in ("num_frames", "min_frames", "max_frames", "max_pixels", "total_pixels", "multiple_of"):
            value = getattr(self, name)
            if value and (value < 1 or value != int(value)):
                raise UserError(f"{name} is {value}; allowed: a whole number from 1 on, or nothing for no limit.")
        if self.fps and not 0 < self.fps < float("inf"):
            raise UserError(f"fps is {self.fps}; allowed: a number above 0, or nothing.")
        if self.num_frames and self.fps:
            raise UserError(f"num_frames is {self.num_frames} and fps {self.fps}; give one of the two.")
        low, high = self.min_frames or 1, self.max_frames or float("inf")
        if low > high:
            raise UserError(f"min_frames is {low}, more than max_frames, which is {high}.")
        if self.num_frames and not low <= self.num_frames <= high:
            raise UserError(
                f"num_frames is {self.num_frames}, outside of min_frames {low} to max_frames {high}; these two go "
                "with fps: leave them out."
            )

    def indices(self, total: int, fps: float) -> np.ndarray:
        """Which frames of a video are shown.

        Args:
            total: how many frames the video has.
            fps: how many of them a second.

        Returns:
            `(F,)` frame numbers from 0 on, ascending; the last may come several times, no other does.
        """
        import numpy as np

        step = self.multiple_of or 1
        if self.num_frames:
            count = min(self.num_frames, total)
        else:
            # Rounded: decoders differ in the last digits of fps, and are to agree on the number.
            wanted = int(round(total / fps * (self.fps or DEFAULT_FPS), 3) + 0.5)
            low, high = self.min_frames or 1, self.max_frames or total
            count = min(max(wanted, low), high, total)
            up = -(-count // step) * step
            count = min(up, total) if up <= high or not self.max_frames else max(up - step, min(low, count))
        chosen = ((np.arange(count) + 0.5) * total / count).astype(np.int64)
        return np.concatenate([chosen, np.repeat(chosen[-1:], -count % step)])

    def frame_size(self, width: int, height: int, frames: int) -> tuple[int, int]:
        """(width, height) in which so many frames of a video of this size are shown."""
        limits = [self.max_pixels, self.total_pixels and max(1, self.total_pixels // frames)]
        limit = min((limit for limit in limits if limit), default=width * height)
        return (width, height) if width * height <= limit else fitting((width, height), limit)


@dataclass(frozen=True)
class Video:
    """The frames of a video that a model is shown.

    Attributes:
        frames: `(F, H, W, 3)` uint8, RGB.
        timestamps: `(F,)` seconds from the video's first frame on, as the file says, also where its rate varies.
        indices: `(F,)` the frames' numbers in the file.
        fps: frames a second of the file, on average.
        total: frames of the file.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    indices: np.ndarray
    fps: float
    total: int

    @property
    def duration(self) -> float:
        """Seconds that the file lasts."""
        return self.total / self.fps


def video_problem(raw: Any) -> str | None:
    """Why `raw` cannot be a video, judged without opening anything; None when it can be one."""
    if isinstance(raw, Video) or _is_decoder(raw):
        return None
    if isinstance(raw, Mapping) and raw.get("frames") is not None:
        fps = raw.get("fps")
        if fps is not None and not (isinstance(fps, (int, float)) and 0 < fps < float("inf")):
            return f"the video's fps is {fps!r}, expected a number above 0"
        raw = raw["frames"]
        if not isinstance(raw, (list, tuple)) and not hasattr(raw, "shape"):
            return f"the video's frames are {type(raw).__name__}, expected a list of images or an array"
    if isinstance(raw, (list, tuple)):
        if not raw:
            return "the video is an empty list, expected its frames"
        problems = (image_problem(frame) for frame in raw if not _is_pixels(frame))
        return next((f"a frame of the video cannot be used: {problem}" for problem in problems if problem), None)
    if hasattr(raw, "shape"):
        shape, kind = tuple(raw.shape), str(raw.dtype).removeprefix("torch.")
        if len(shape) == 4 and shape[-1] == 3 and kind == "uint8":
            return None if 0 not in shape else f"the video is an array of shape {shape}, so it has no pixels"
        return f"the video is an array of shape {shape} and {kind}, expected (frames, height, width, 3) and uint8"
    return file_problem(raw, "video", _EXPECTED)


def is_frames(raw: Any) -> bool:
    """Whether a list is the frames of one video, by what it holds, and not several videos."""
    if not isinstance(raw, (list, tuple)) or not raw:
        return False
    return all(hasattr(frame, "convert") or _is_pixels(frame) or _is_image_file(frame) for frame in raw)


def _is_image_file(frame: Any) -> bool:
    """Whether a file is an image by its name, or by the first `images.HEAD` of its bytes."""
    path, data = (frame.get("path"), frame.get("bytes")) if isinstance(frame, Mapping) else (frame, frame)
    if isinstance(path, (str, os.PathLike)) and os.fspath(path).lower().endswith(FRAME_SUFFIXES):
        return True
    if not isinstance(data, (bytes, bytearray)):
        return False
    return data.startswith(_FRAME_HEADS) or (data.startswith(b"RIFF") and data[8:12] == b"WEBP")


def decode_video(
    raw: Any, *, row: int, sampling: FrameSampling, cache: FrameCache | None = None, decoder: str = "auto"
) -> Video:
    """Decode the frames of one video that a model is shown; no other frame is converted or kept.

    Args:
        raw: a path, encoded bytes, `{"bytes": bytes | None, "path": str | None}`, a decoder of `datasets.Video`; or
            frames that are decoded already or lie in image files: a list of what `decode_image` takes, an array
            `(frames, height, width, 3)` uint8, or one of the two as `{"frames": ..., "fps": float}` (without: 1); or a
            Video, which is given back as it is.
        row: the row's number, for the error.
        sampling: which frames, and how large.
        cache: where the frames of files are looked for, and kept.
        decoder: "auto" (PyAV, torchcodec, decord: the first that is installed), or the name of one:
            "pyav", "torchcodec", "decord" (whose frames are not always those asked for: see video_decoders.py).

    Raises:
        DataError: a missing, empty, broken or truncated file, one without a video stream or frames, a URL, or frames
            that would need more than 4 GiB.
        UserError: no decoder is installed, or not the one that is asked for.
    """
    problem = video_problem(raw)
    if problem:
        raise DataError(f"row {row}: {problem}")
    if isinstance(raw, Video):
        return raw
    name = f"row {row}: {_name(raw)}"
    clip = _clip_of_frames(raw, row)
    if clip is not None:
        return _shown(clip, sampling, name)
    source = _source(raw, row)
    key = cache.key(source, sampling, decoder) if cache is not None else None
    video = cache.load(key) if key is not None else None
    if video is None:
        from shared.data.video_decoders import open_clip

        with _named_faults(name):
            video = _shown(open_clip(source, decoder), sampling, name)
        if key is not None:
            cache.save(key, video)
    return video


def video_size(raw: Any, *, row: int, decoder: str = "auto") -> tuple[int, int]:
    """(width, height) of a video by its first frame; raises as decode_video does, but for what lies further back."""
    problem = video_problem(raw)
    if problem:
        raise DataError(f"row {row}: {problem}")
    if isinstance(raw, Video):
        return raw.frames.shape[2], raw.frames.shape[1]
    clip = _clip_of_frames(raw, row)
    if clip is not None:
        pixels, _ = next(clip.read([0]))
    else:
        from shared.data.video_decoders import first_frame

        source = _source(raw, row)
        with _named_faults(f"row {row}: {_name(raw)}"):
            pixels = first_frame(source, decoder)
    return pixels.shape[1], pixels.shape[0]


@contextmanager
def _named_faults(name: str) -> Iterator[None]:
    """What a decoder raises as a DataError that names the video."""
    from shared.data.video_decoders import VideoFault

    try:
        yield
    except (UserError, MemoryError):
        raise
    except VideoFault as fault:
        raise DataError(f"{name} cannot be read: {fault}") from fault
    # Broken data makes decoders raise whatever they like.
    except Exception as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        words = shorten(words[-1])
        raise DataError(f"{name} cannot be read: it is broken, cut short, or no video file ({words})") from error


def _shown(clip: Clip, sampling: FrameSampling, name: str) -> Video:
    """The frames of a clip that are shown, made smaller one by one as they are decoded."""
    import numpy as np
    from PIL import Image

    indices = sampling.indices(clip.total, clip.fps)
    numbers, places = np.unique(indices, return_inverse=True)
    frames, seconds = None, np.zeros(len(numbers))
    for at, (pixels, second) in enumerate(clip.read(numbers.tolist())):
        if frames is None:
            width, height = size = sampling.frame_size(pixels.shape[1], pixels.shape[0], len(indices))
            if len(indices) * width * height * 3 > _MOST_BYTES:
                raise DataError(
                    f"{name} gives {len(indices):,} frames of {width}×{height}, more than fit into 4 GiB: limit them "
                    "with max_frames or num_frames, or their size with max_pixels or total_pixels"
                )
            frames = np.empty((len(numbers), height, width, 3), np.uint8)
        if pixels.shape[:2] != (height, width):
            pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
        frames[at], seconds[at] = pixels, second
    if len(indices) > len(numbers):
        frames, seconds = frames[places], seconds[places]
    return Video(frames, seconds, indices, clip.fps, clip.total)


class _Frames:
    """Frames that a row gives one by one, as a clip."""

    def __init__(self, frames: Any, fps: float, row: int):
        self.frames, self.fps, self.row = frames, float(fps), row
        self.total = len(frames)

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
        import numpy as np

        for number in numbers:
            frame = self.frames[number]
            yield np.asarray(frame if _is_pixels(frame) else decode_image(frame, row=self.row)), number / self.fps


def _clip_of_frames(raw: Any, row: int) -> _Frames | None:
    """The clip of a row's frames where it gives such; None for a file."""
    fps = 1.0
    if isinstance(raw, Mapping) and raw.get("frames") is not None:
        fps, raw = raw.get("fps") or fps, raw["frames"]
    return _Frames(raw, fps, row) if isinstance(raw, (list, tuple)) or hasattr(raw, "shape") else None


def _is_pixels(frame: Any) -> bool:
    shape = getattr(frame, "shape", ())
    return len(shape) == 3 and shape[-1] == 3 and 0 not in shape and str(frame.dtype).endswith("uint8")


def _is_decoder(raw: Any) -> bool:
    """Whether this is a decoder of torchcodec, as a column `datasets.Video` gives."""
    return hasattr(raw, "get_frame_at") and hasattr(raw, "metadata")


def _source(raw: Any, row: int) -> Any:
    """The path (str) or bytes of a video, or the decoder where that is all there is. Raises DataError."""
    if _is_decoder(raw):
        encoded = getattr(raw, "_hf_encoded", None)
        if not encoded or video_problem(encoded):
            return raw
        raw = encoded
    name = _name(raw)
    if isinstance(raw, Mapping):
        raw = raw["bytes"] if raw.get("bytes") is not None else raw["path"]
    if isinstance(raw, (bytes, bytearray)):
        if not raw:
            raise DataError(f"row {row}: {name} is empty: 0 bytes")
        return bytes(raw)
    path = os.fspath(raw)
    if os.path.isdir(path):
        raise DataError(f"row {row}: {name} is a folder, expected a file; frames are given as a list of their files")
    try:
        with open(path, "rb") as file:
            empty = not file.read(1)
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise DataError(f"row {row}: {name} cannot be read: {reason}") from error
    if empty:
        raise DataError(f"row {row}: {name} is empty: 0 bytes")
    return path


def _name(raw: Any) -> str:
    path = raw.get("path") if isinstance(raw, Mapping) else raw
    return f"video {shorten(os.fspath(path))!r}" if isinstance(path, (str, os.PathLike)) else "the video"
