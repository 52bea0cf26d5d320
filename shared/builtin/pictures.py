"""`builtin/picture-prompts` and `builtin/picture-preferences`: prompts such as "a red circle", and drawn pictures.

A picture is 32 x 32 pixels: one object in one of six colours on a plain background, which is light or dark; the size
of the object and its place are drawn. Some combinations of colour and form are asked for in the "test" rows alone.
What the built-in pipelines learn from (`drawings`, `captions`) has them all, but a part of its captions may name a
wrong colour, as captions from the web do. Everything is drawn from the seed and held in memory.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from shared.builtin.rows import png
from shared.builtin.shapes import cover

if TYPE_CHECKING:
    from datasets import Dataset

SIZE = 32  # pixels, height and width
FORMS = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (225, 35, 40),
    "green": (35, 165, 60),
    "blue": (45, 70, 235),
    "yellow": (245, 215, 30),
    "purple": (165, 50, 195),
    "cyan": (40, 205, 220),
}
# The combinations that are held out: each colour once.
HELD_OUT = (
    ("red", "cross"),
    ("green", "circle"),
    ("blue", "triangle"),
    ("yellow", "square"),
    ("purple", "circle"),
    ("cyan", "triangle"),
)
PHRASES = tuple(
    f"{frame}{article} {{colour}} {{form}}"
    for frame in ("", "a picture of ", "a drawing of ", "an image of ")
    for article in ("a", "one", "the", "a single")
)
PREFERENCE_ROWS = {"train": 512, "test": 128}

_SIZES = (13, 14, 15, 16, 17, 18, 19, 20)  # pixels across
_MARGIN = 2  # pixels around the object, at least
_BACKGROUNDS = (25, 230)  # dark and light grey
_SPREAD = 12  # of a background's grey


class Drawing(NamedTuple):
    """What there is to draw; `left`, `top` and `size` in pixels, `background` a grey from 0 to 255."""

    colour: str
    form: str
    left: int
    top: int
    size: int
    background: int


def load_prompts(split: str) -> Dataset:
    """Rows of `prompt`, `colour`, `form`: every phrase for every combination of the split, in mixed order."""
    from datasets import Dataset

    rows = [
        {"prompt": phrase.format(colour=colour, form=form), "colour": colour, "form": form}
        for colour, form in combinations(split)
        for phrase in PHRASES
    ]
    random.Random(f"picture-prompts {split}").shuffle(rows)
    return Dataset.from_list(rows)


def load_preferences(split: str, seed: int = 0) -> Dataset:
    """Rows of `prompt`, `chosen`, `rejected` (images): the colour that is asked for, and the same in another one."""
    from datasets import Dataset, Features, Image, Value

    rng = random.Random(f"picture-preferences {split} {seed}")
    rows = []
    for _ in range(PREFERENCE_ROWS[split]):
        colour, form = rng.choice(combinations(split))
        chosen = draw(colour, form, rng)
        # Of a train row no held-out combination either: what is rejected only would be learnt to be wrong.
        known = [c for c in COLOURS if split == "test" or (c, form) not in HELD_OUT]
        rejected = chosen._replace(colour=other_colour(colour, rng, known))
        pictures = {
            name: {"bytes": png(paint(drawing)), "path": None}
            for name, drawing in {"chosen": chosen, "rejected": rejected}.items()
        }
        rows.append({"prompt": rng.choice(PHRASES).format(colour=colour, form=form), **pictures})
    return Dataset.from_list(
        rows, features=Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    )


def drawings(rows: int, seed: int = 0) -> list[Drawing]:
    """What the built-in pipelines learn from: all combinations of colour and form."""
    rng = random.Random(f"pictures {seed}")
    return [draw(rng.choice(list(COLOURS)), rng.choice(FORMS), rng) for _ in range(rows)]


def captions(drawings: Sequence[Drawing], wrong: float = 0.0, seed: int = 0) -> list[str]:
    """What is said of each drawing; a share `wrong` of the captions name another colour."""
    rng = random.Random(f"captions {seed}")
    said = []
    for drawing in drawings:
        colour = other_colour(drawing.colour, rng) if rng.random() < wrong else drawing.colour
        said.append(rng.choice(PHRASES).format(colour=colour, form=drawing.form))
    return said


def combinations(split: str) -> Sequence[tuple[str, str]]:
    """Colour and form of what the prompts of a split ask for."""
    if split == "test":
        return HELD_OUT
    return [(c, f) for c in COLOURS for f in FORMS if (c, f) not in HELD_OUT]


def other_colour(colour: str, rng: random.Random, known: Iterable[str] = COLOURS) -> str:
    """Any of the known colours but this one."""
    return rng.choice([other for other in known if other != colour])


def draw(colour: str, form: str, rng: random.Random) -> Drawing:
    """Draw size, place and background."""
    size = rng.choice(_SIZES)
    left, top = (rng.randint(_MARGIN, SIZE - _MARGIN - size) for _ in range(2))
    return Drawing(colour, form, left, top, size, rng.choice(_BACKGROUNDS) + rng.randint(-_SPREAD, _SPREAD))


def paint(drawing: Drawing) -> np.ndarray:
    """The picture (32, 32, 3) uint8."""
    picture = np.full((SIZE, SIZE, 3), drawing.background, np.float32)
    part = picture[drawing.top : drawing.top + drawing.size, drawing.left : drawing.left + drawing.size]
    part += cover(drawing.form, drawing.size)[..., None] * (np.array(COLOURS[drawing.colour], np.float32) - part)
    return picture.round().astype(np.uint8)
