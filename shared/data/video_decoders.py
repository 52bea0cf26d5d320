"""The libraries that open video files, each as a `Clip`: how many frames, how fast, and any of them by number.

PyAV and torchcodec give the frames that are asked for. decord does so of what most files hold, H.264 in closed groups
of pictures; of others (HEVC, open groups, transport streams, FLV, WMV) it gives neighbours of them without a word, and
newer codecs it does not know: it comes last, and is there for those who cannot have the others, or ask for it. All
decode on one thread: the data workers are what runs side by side.
"""

from __future__ import annotations

import importlib
import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import numpy as np

from shared.errors import UserError


class VideoFault(Exception):
    """What is wrong with a video, in words for the user."""


class Clip(Protocol):
    """An opened video.

    Attributes:
        total: how many frames it has; at least 1.
        fps: how many of them a second, on average.
    """

    total: int
    fps: float

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
        """Decode the frames of these ascending numbers: `(H, W, 3)` uint8, and its seconds from the first frame on."""


NO_STREAM = "there is no video stream in it"
NO_FRAMES = "it has no frames"


class DecordClip:
    """A video opened by decord."""

    def __init__(self, source: str | bytes):
        import decord

        # What is broken we say ourselves, by row; the library's lines would stand between the figures of a training.
        decord.logging.set_level(decord.logging.QUIET)
        try:
            self._reader = decord.VideoReader(_readable(source), num_threads=1)
        except decord.DECORDError as error:
            if "cannot find video stream" in str(error):
                raise VideoFault(NO_STREAM) from error
            raise
        self.total = len(self._reader)
        starts = self._reader.get_frame_timestamp(np.arange(self.total))[:, 0].astype(np.float64)
        self._seconds, self.fps = _timeline(starts, self._reader.get_avg_fps())

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
        for number in numbers:
            # One by one: `get_batch` never returns from some files, and would hold all frames in full size.
            frame = self._reader[number]
            pixels = frame.asnumpy() if hasattr(frame, "asnumpy") else np.asarray(frame)
            height, width, deep = pixels.shape
            if deep != 3:  # of some small widths (48 is one) it gives whole lines of memory, their padding too
                pixels = pixels.reshape(height, width * deep)[:, : width * 3].reshape(height, width, 3)
            yield pixels, float(self._seconds[number])


class PyAVClip:
    """A video opened by PyAV: a first pass over the packets finds every frame's time, and decodes nothing."""

    def __init__(self, source: str | bytes):
        self._source = source
        times, keys, ended, nameless, damaged = [], [], 0.0, False, False
        with _opened(source) as container:
            stream = _video_stream(container)
            for packet in container.demux():
                if packet.pts is not None and packet.time_base is not None:
                    ended = max(ended, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream.index != stream.index or not packet.size:
                    continue
                damaged |= packet.is_corrupt
                nameless |= packet.pts is None
                if packet.pts is None or packet.is_discard or packet.is_corrupt:
                    continue
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
            rate, base, lasts = stream.average_rate, stream.time_base, (container.duration or 0) / 1e6
        _check_whole(ended, lasts, damaged)
        if nameless:
            raise VideoFault("its frames have no times: put the stream into a container such as mp4")
        if not times:
            raise VideoFault(NO_FRAMES)
        self.total = len(times)
        self._times, self._keys = sorted(times), sorted(keys)
        self._seconds, self.fps = _timeline(np.array([float(time * base) for time in self._times]), rate)

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
        yield from self._read(numbers, seeking=True)

    def _read(self, numbers: Sequence[int], seeking: bool) -> Iterator[tuple[np.ndarray, float]]:
        with _opened(self._source) as container:
            stream = _video_stream(container)
            stream.codec_context.thread_count = 1
            frames, frame, at = container.decode(stream), None, self._times[0]
            for place, number in enumerate(numbers):
                wanted = self._times[number]
                key = self._key_before(wanted)
                if seeking and key > at:
                    container.seek(key, stream=stream)
                    frames = container.decode(stream)
                    frame = next(frames, None)
                    landed = None if frame is None else frame.pts
                    if landed is None or landed > wanted or landed != self._key_before(landed):
                        # Not at a key frame, as in streams without an index: from the start, then.
                        yield from self._read(numbers[place:], seeking=False)
                        return
                while frame is None or frame.pts is None or frame.pts < wanted:
                    frame = next(frames, None)
                    if frame is None:
                        raise VideoFault(f"it is broken: frame {number} of {self.total} is missing")
                at = frame.pts
                yield _upright(frame), float(self._seconds[number])

    def _key_before(self, wanted: int) -> int:
        """The time of the last frame before it that can be decoded without others."""
        place = bisect_right(self._keys, wanted)
        return self._keys[place - 1] if place else self._times[0]


class TorchcodecClip:
    """A video opened by torchcodec, or a decoder of its that a data set's column `datasets.Video` gave."""

    def __init__(self, source: Any):
        if isinstance(source, (str, bytes)):
            from torchcodec.decoders import VideoDecoder

            try:
                source = VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1)
            except ValueError as error:
                if "video stream is unknown" in str(error):
                    raise VideoFault(NO_STREAM) from error
                raise
        self._decoder, about = source, source.metadata
        self.total = about.num_frames or 0
        _check_whole(about.end_stream_seconds or 0, about.duration_seconds_from_header or 0)
        if not self.total:
            raise VideoFault(NO_FRAMES)
        self.fps = round(float(about.average_fps or 1), 4)

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
        for number in numbers:
            frame = self._decoder.get_frame_at(number)
            pixels = frame.data.cpu().numpy()
            first = self._decoder.metadata.begin_stream_seconds or 0.0
            yield (pixels if pixels.shape[-1] == 3 else pixels.transpose(1, 2, 0)), float(frame.pts_seconds - first)


# Name for users -> the module to look for, what to install, and the class; in the order in which they are tried.
_DECODERS: dict[str, tuple[str, str, Callable[[Any], Clip]]] = {
    "pyav": ("av", "pip install av", PyAVClip),
    "torchcodec": ("torchcodec.decoders", "pip install torchcodec, and FFmpeg", TorchcodecClip),
    "decord": ("decord", "pip install decord (Linux on x86-64 only)", DecordClip),
}
DECODERS = ("auto", *_DECODERS)


def open_clip(source: Any, decoder: str = "auto") -> Clip:
    """Open a video.

    Args:
        source: a path, bytes, or a decoder of torchcodec.
        decoder: "auto" for the first that can be imported, or the name of one.

    Raises:
        UserError: an unknown name, or nothing of this name, or at all, is installed.
        VideoFault: what is wrong with the video; whatever else the library raises at broken data.
    """
    return _chosen(source, decoder)(source)


def first_frame(source: Any, decoder: str = "auto") -> np.ndarray:
    """`(H, W, 3)` of a video's first frame, the rest of the file not looked at where the decoder allows it.

    Arguments and errors as open_clip.
    """
    chosen = _chosen(source, decoder)
    if chosen is not PyAVClip:
        return next(chosen(source).read([0]))[0]
    with _opened(source) as container:
        frame = next(container.decode(_video_stream(container)), None)
        if frame is None:
            raise VideoFault(NO_FRAMES)
        return _upright(frame)


def _chosen(source: Any, decoder: str) -> Callable[[Any], Clip]:
    if decoder not in DECODERS:
        raise UserError(f"The video decoder is {decoder!r}; allowed: {', '.join(DECODERS)}.")
    if not isinstance(source, (str, bytes)):
        return TorchcodecClip
    wanted = tuple(_DECODERS) if decoder == "auto" else (decoder,)
    for name in wanted:
        if _can_be_imported(_DECODERS[name][0]):
            return _DECODERS[name][2]
    missing = "none of the decoders is installed" if decoder == "auto" else f"the decoder {decoder} is not installed"
    ways = ", or ".join(_DECODERS[name][1] for name in wanted)
    raise UserError(f"The data has videos, but {missing}. Do: {ways}.")


@cache
def _can_be_imported(module: str) -> bool:
    try:
        importlib.import_module(module)
    # Beside a missing package: one whose own libraries are missing, as torchcodec's without FFmpeg.
    except Exception:
        return False
    return True


@contextmanager
def _opened(source: str | bytes) -> Iterator[Any]:
    """A container of PyAV, the library's errors in words for the user, in decoding too."""
    import av

    try:
        with av.open(_readable(source)) as container:
            yield container
    except av.FFmpegError as error:
        raise VideoFault(f"it is broken, cut short, or no video file ({error.strerror})") from error


def _readable(source: str | bytes) -> str | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _video_stream(container: Any) -> Any:
    if not container.streams.video:
        raise VideoFault(NO_STREAM)
    return container.streams.video[0]


def _upright(frame: Any) -> np.ndarray:
    """The pixels of a frame of PyAV, turned as the file says."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def _check_whole(ended: float, lasts: float, damaged: bool = False) -> None:
    """Raise VideoFault where a file of `lasts` seconds by its head ends well before: all of its streams have ended."""
    if damaged or lasts - ended > max(0.5, 0.1 * lasts):
        raise VideoFault(f"it is cut short: it ends after {ended:.1f} of {lasts:.1f} seconds")


def _timeline(starts: np.ndarray, rate: Any) -> tuple[np.ndarray, float]:
    """The frames' seconds from the first one on, and how many there are a second, rounded as decoders differ.

    Args:
        starts: `(n,)` seconds at which they are shown.
        rate: what the file says of their rate, for where the seconds are of no use.
    """
    span = starts[-1] - starts[0]
    if np.isfinite(starts).all() and span > 0:
        return (starts - starts[0]).round(6), round(float((len(starts) - 1) / span), 4)
    rate = float(rate or 0)
    fps = round(rate, 4) if np.isfinite(rate) and rate > 0 else 1.0
    return np.arange(len(starts)) / fps, fps
