"""Videos of a row: which of their frames are seen, what a processor is told of them, and what people are shown.

Reading files is shared.data.videos; where a video stands in a row and in a batch is reading.py and collators.py.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.data.frame_cache import FrameCache
from shared.data.videos import FrameSampling, Video, decode_video
from shared.errors import UserError
from visionalign.families import Family

if TYPE_CHECKING:
    from PIL import Image
    from transformers import ProcessorMixin

FRAMES_SHOWN = 4  # of a video in the report
SHOWN_PIXELS = 65_536  # of a frame in the report
BLANK = 32  # height and width of a blank frame


@dataclass(frozen=True)
class VideoReader:
    """Decodes the videos of rows for one family.

    Args:
        sampling: which frames are seen, how large.
        cache: keeps decoded frames on disk.
        decoder: `auto`, or the one to use; see shared.data.videos.
        exactly: this many frames of each video, those of shorter ones repeated; None: as many as the sampling gives.
    """

    sampling: FrameSampling
    cache: FrameCache | None = None
    decoder: str = "auto"
    exactly: int | None = None

    def __call__(self, raw: Any, row: int) -> Video:
        """The video that a row holds as `raw`. Raises DataError naming the row."""
        video = decode_video(raw, row=row, sampling=self.sampling, cache=self.cache, decoder=self.decoder)
        count = len(video.frames)
        wanted = self.exactly or -(-count // self.sampling.multiple_of) * self.sampling.multiple_of
        if count == wanted:
            return video
        kept = np.minimum(np.arange(wanted), count - 1)
        if self.exactly:
            kept = ((np.arange(wanted) + 0.5) * count / wanted).astype(int)
        return replace(
            video, frames=video.frames[kept], timestamps=video.timestamps[kept], indices=video.indices[kept]
        )

    def blank(self) -> Video:
        """A tiny black video of as few frames as the family takes."""
        count = self.exactly or self.sampling.multiple_of
        frames = np.zeros((count, BLANK, BLANK, 3), np.uint8)
        return Video(frames, np.arange(count, dtype=float), np.arange(count), 1.0, count)


def video_reader(family: Family, processor: ProcessorMixin, options: Any = None) -> VideoReader:
    """How videos are read for a family.

    Args:
        options: with the fields of visionalign.options.VideoOptions; None: none is set.

    Raises:
        UserError: options that contradict each other or the family.
    """

    def option(name: str) -> Any:
        return getattr(options, f"video_{name}", None)

    usual = dict(family.sampling)
    sized = {name: usual.pop(name, None) for name in ("max_pixels", "total_pixels")}
    sized = {name: option(name) or value for name, value in sized.items()}
    given = {name: option(name) for name in ("num_frames", "fps", "min_frames", "max_frames")}
    given = {name: value for name, value in given.items() if value is not None}
    if "num_frames" in given and "fps" in given:
        raise UserError(
            f"video_num_frames is {given['num_frames']} and video_fps {given['fps']}: give one, none for the other."
        )
    FrameSampling(**given)  # raises where what is asked for contradicts itself, before the family's own is put to it
    if family.equal_frames and "fps" in given:
        raise UserError(
            f"video_fps: models of the family {family.name} see equally many frames of each video. Give "
            "video_num_frames."
        )
    if "num_frames" in given:
        fields = given
    elif "fps" in given or "num_frames" not in usual:
        usual.pop("num_frames", None)
        fields = {**usual, **given}
        if fields.get("min_frames", 1) > fields.get("max_frames", sys.maxsize):  # what was asked for counts
            fields = {name: value for name, value in fields.items() if name in given or not name.endswith("_frames")}
    else:
        most, least = given.get("max_frames"), given.get("min_frames", 1)
        fields = {"num_frames": max(min(usual["num_frames"], most or sys.maxsize), least)}
    together = getattr(getattr(processor, "video_processor", None), "temporal_patch_size", None) or 1
    sampling = FrameSampling(**fields, **sized, multiple_of=together if family.video else 1)
    cache = option("cache")
    if cache:
        cache = FrameCache(None if cache is True else cache)
    exactly = sampling.num_frames if family.equal_frames else None
    return VideoReader(sampling, cache or None, option("decoder") or "auto", exactly)


def video_inputs(videos: Sequence[Video], processor: ProcessorMixin) -> dict[str, Any]:
    """What a processor takes as `videos` and `videos_kwargs`: frames that are chosen already, and when they are."""
    if not videos:
        return {}
    options: dict[str, Any] = {
        "do_sample_frames": False,
        "return_tensors": "pt",
        "input_data_format": "channels_last",
        "video_metadata": [_metadata(video) for video in videos],
    }
    if "cap_pixels_per_frame" in _known_options(type(processor.video_processor)):
        options["cap_pixels_per_frame"] = False  # the sampling has seen to the size
    return {"videos": [video.frames for video in videos], "videos_kwargs": options}


@functools.cache
def _known_options(video_processor: type) -> frozenset[str]:
    return frozenset(getattr(getattr(video_processor, "valid_kwargs", None), "__annotations__", ()))


def _metadata(video: Video) -> dict[str, Any]:
    """What a processor reckons times from: it takes a frame's to be its number by the rate."""
    exact = video.timestamps * video.fps
    steady = np.allclose(exact, video.indices, atol=1e-3)
    return {
        "fps": float(video.fps),
        "total_num_frames": int(video.total),
        "duration": float(video.duration),
        "frames_indices": (video.indices if steady else exact).tolist(),
    }


def template_of(processor: ProcessorMixin, family: Family) -> str | None:
    """The chat template of rows with videos, where it is not the model's own."""
    return sys.modules[type(processor).__module__].DEFAULT_CHAT_TEMPLATE if family.video_template else None


def as_pictures(video: Video) -> list[Image.Image]:
    """Every frame as an image."""
    from PIL import Image

    return [Image.fromarray(frame) for frame in video.frames]


def shown_frames(video: Video, count: int = FRAMES_SHOWN) -> list[Image.Image]:
    """Some frames, evenly spaced, as small images for people."""
    total = len(video.frames)
    count = min(count, total)
    pictures = as_pictures(replace(video, frames=video.frames[[at * total // count for at in range(count)]]))
    for picture in pictures:
        picture.thumbnail((int(SHOWN_PIXELS**0.5),) * 2)
    return pictures
