"""`builtin/moving-shapes`: questions about video files in which a coloured shape moves.

A clip is a real mp4 file of 48 x 48 pixels, black, 8 to 12 frames at 8 a second: one shape that goes left, right, up
or down, or stays where it is. Form, colour, the cell of 3 x 3 it starts from and its direction together (the *motion*)
decide by their hash whether a clip belongs to the training or the held-out set, so the two are disjoint whatever the
seed. The files are drawn from the seed and written on first use, in a few seconds; `write` makes the same folder
anywhere, and as a data set it can be named by its path.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import uuid
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shared.builtin import shapes
from shared.builtin.rows import IMAGE_SIZE
from shared.cache import cache_folder, locked
from shared.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

FPS = 8
FRAMES = (8, 12)  # fewest and most of a clip
CLIPS = {"train": 1000, "test": 100}
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0), "nowhere": (0, 0)}  # rows, columns

_CELL = IMAGE_SIZE // 3
_SIZES = (14, 15, 16)  # pixels across
_TRAVEL = (14, 30)  # pixels, as far as there is room
_HELD_OUT = 8  # one motion in so many is held out


class Motion(NamedTuple):
    """What a clip shows; `start` is a cell, 0..8 from the top left, row by row, and `direction` a key of STEPS."""

    form: str
    colour: str
    start: int
    direction: str


def load(split: str) -> Dataset:
    """The "train" or "test" rows: `videos` (a list of one file), `messages` and `kind`.

    Raises:
        UserError: the files cannot be written: PyAV is missing, or the cache's folder cannot be written to.
    """
    from datasets import Dataset, Features, List, Value, Video

    folder = _made() / split
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["videos"] = [{"bytes": None, "path": str(folder / name)} for name in row["videos"]]
    turn = {"role": Value("string"), "content": Value("string")}
    features = {"videos": List(Video(decode=False)), "messages": List(turn), "kind": Value("string")}
    return Dataset.from_list(rows, features=Features(features))


def write(folder: str | os.PathLike, seed: int = 0, clips: dict[str, int] | None = None) -> None:
    """Write both splits: `<folder>/<split>/metadata.jsonl` and the mp4 files that it names.

    Args:
        folder: made where it is missing.
        seed: draws the clips.
        clips: how many of each split; None: CLIPS.

    Raises:
        UserError: PyAV is not installed.
    """
    for split, count in (clips or CLIPS).items():
        rng = random.Random(f"moving-shapes {split} {seed}")
        place = Path(folder) / split
        place.mkdir(parents=True, exist_ok=True)
        with open(place / "metadata.jsonl", "w", encoding="utf-8") as file:
            for number in range(count):
                motion = draw_motion(split, rng)
                name = f"{number:04d}.mp4"
                _encode(paint(motion, rng), place / name)
                for kind in ("direction", "what" if number % 2 else "colour"):
                    question, answer = ask(kind, motion)
                    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                    file.write(json.dumps({"videos": [name], "messages": turns, "kind": kind}) + "\n")


def draw_motion(split: str, rng: random.Random) -> Motion:
    """Draw a motion of the split that has room for at least a cell's way."""
    direction = rng.choice(list(STEPS))
    while True:
        start = rng.randrange(9)
        ends = [at + step for at, step in zip(divmod(start, 3), STEPS[direction], strict=True)]
        motion = Motion(rng.choice(shapes.FORMS), rng.choice(list(shapes.COLOURS)), start, direction)
        if all(0 <= end < 3 for end in ends) and split_of(motion) == split:
            return motion


def split_of(motion: Motion) -> str:
    """Which split a motion belongs to: a property of the motion alone."""
    digest = blake2b(repr(tuple(motion)).encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "big") % _HELD_OUT == 0 else "train"


def ask(kind: str, motion: Motion) -> tuple[str, str]:
    """The question of this kind about a motion, and its answer."""
    match kind:
        case "direction":
            return f"Which way does the {motion.form} move?", motion.direction
        case "what":
            return "What moves?", "nothing" if motion.direction == "nowhere" else f"{motion.form} {motion.colour}"
        case "colour":
            return f"What colour is the {motion.form}?", motion.colour
    raise ValueError(f"unknown kind of question {kind!r}")


def paint(motion: Motion, rng: random.Random) -> np.ndarray:
    """The frames (F, 48, 48, 3) uint8; `rng` varies their number, the shape's size, place in the cell and way."""
    frames, size = rng.randint(*FRAMES), rng.choice(_SIZES)
    start = np.array(divmod(motion.start, 3)) * _CELL + [rng.randint(0, _CELL - size) for _ in range(2)]
    step = np.array(STEPS[motion.direction])
    # The way to the edge ahead; of the two coordinates at most one changes.
    room = sum(IMAGE_SIZE - size - at if way > 0 else at for at, way in zip(start, step, strict=True) if way)
    way = rng.randint(min(_TRAVEL[0], room), min(_TRAVEL[1], room))
    clip = np.zeros((frames, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for number, frame in enumerate(clip):
        y, x = start + step * round(way * number / (frames - 1))
        frame[y : y + size, x : x + size] = shapes.sprite(motion.form, motion.colour, size)
    return clip


def _encode(clip: np.ndarray, path: Path) -> None:
    try:
        import av
    except ImportError as error:
        raise UserError("builtin/moving-shapes writes video files, which needs PyAV: pip install av.") from error
    with av.open(path, "w") as container:
        # MPEG-4: every build of FFmpeg writes it, and of clips so small in half the time that H.264 takes.
        stream = container.add_stream("mpeg4", rate=FPS, options={"b": "2000000"})
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _made() -> Path:
    """The folder of the files, written first where it is missing."""
    made_by = b"".join(Path(module).read_bytes() for module in (__file__, shapes.__file__))
    folder = cache_folder(f"moving-shapes-{blake2b(made_by, digest_size=6).hexdigest()}")
    if folder.exists():
        return folder
    part = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    try:
        with locked(folder):
            if not folder.exists():
                write(part)
                with suppress(OSError):  # another machine was first
                    os.rename(part, folder)
    except OSError as error:
        raise UserError(
            f"builtin/moving-shapes cannot write its video files to {folder}: {error.strerror}. "
            "Set TRIALIGN_CACHE to a folder that can be written to."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder
