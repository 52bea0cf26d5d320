"""Small video files with known content, written by PyAV."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np


def clip(frames=24, height=48, width=64):
    """`(F, H, W, 3)`: frame i is red by its number, and a green block wanders to the right."""
    pixels = np.zeros((frames, height, width, 3), np.uint8)
    for number, frame in enumerate(pixels):
        frame[..., 0] = round(200 * number / max(1, frames - 1))
        left = round((width - 12) * number / max(1, frames - 1))
        frame[10:22, left : left + 12] = (40, 190, 60)
    return pixels


def write_video(path, pixels, fps=8, codec="libx264", times=None, head_first=False, **options):
    """Write frames as a video file; returns its path.

    Args:
        times: seconds at which they are shown, where their rate varies.
        head_first: the mp4's index stands in front of its frames.
        options: the encoder's.
    """
    options = {name.replace("_", "-"): str(value) for name, value in options.items()}
    with av.open(path, "w", options={"movflags": "faststart"} if head_first else {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        unit = Fraction(1, fps) if times is None else Fraction(1, 1000)
        stream.codec_context.time_base = unit
        for number, image in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number if times is None else round(times[number] * 1000)
            frame.time_base = unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path, pictures=False):
    """A file of some silence and no picture; with `pictures` it has a stream for them, and nothing is in it."""
    with av.open(path, "w") as container:
        if pictures:
            empty = container.add_stream("mpeg4", rate=8)
            empty.width = empty.height = 48
        stream = container.add_stream("aac", rate=16000)
        container.start_encoding()
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
