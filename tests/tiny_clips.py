"""Clips of noise and rows that show them, for the tests of vision-language models on videos."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
from tiny import FAMILIES
from tiny_pictures import picture

VIDEO = tuple(family for family in FAMILIES if family != "paligemma")  # see videos, some of them as images
NATIVE = ("llava_next_video", "llava_onevision", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FEW = SimpleNamespace(video_num_frames=2)  # options that keep tests short


def noise(seed, frames=6, height=32, width=40):
    """`(F, H, W, 3)` uint8."""
    return np.random.default_rng(seed).integers(0, 255, (frames, height, width, 3), dtype=np.uint8)


def clip(seed, frames=6, height=32, width=40, fps=4.0):
    """A video as a row has it: frames that are decoded already."""
    return {"frames": noise(seed, frames, height, width), "fps": fps}


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def mixed():
    """Rows with a video, an image, neither, two videos of unlike length and size, and both kinds."""
    return [
        {"messages": chat("What moves?", "left"), "videos": [clip(0)]},
        {"messages": chat("What colour?", "red"), "images": [picture(1)]},
        {"messages": chat("How many?", "one two")},
        {"messages": chat("First <video> then <video> what?", "top"), "video": [clip(2, 2), clip(3, 9, 24, 24)]},
        {"messages": chat("See <image> and <video> now", "both"), "videos": [clip(4)], "images": [picture(5)]},
    ]


SAID = ("left", "red", "one two", "top", "both")
