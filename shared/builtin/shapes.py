"""`builtin/shapes`, its prompts and `builtin/shapes-simple`: questions about drawn pictures of one to three shapes.

A picture is 48 x 48 pixels, black, divided into 3 x 3 cells; each shape fills a cell and no two have the same form.
What is where (the *layout*) decides by its hash whether a picture belongs to the training or the held-out set, so the
two are disjoint whatever the seed. Everything is drawn from the seed in about a second and held in memory.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from shared.builtin.rows import IMAGE_SIZE, Question, png, to_dataset, to_prompts

if TYPE_CHECKING:
    from datasets import Dataset

FORMS = ("circle", "square", "triangle")
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 220, 40),
    "purple": (170, 60, 200),
    "white": (245, 245, 245),
}
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
COUNTS = ("0", "1", "2", "3")

# Rows of each kind. Descriptions are what makes the model learn which colour goes with which form: with questions on
# one shape alone it keeps naming any colour that is in the picture. The way back, from colour to form, is not part of
# them and takes more rows.
TRAIN_ROWS = {"colour": 1000, "shape": 2400, "where": 800, "count": 400, "describe": 1600}
TEST_ROWS = {"colour": 200, "shape": 200, "where": 100, "count": 100, "describe": 100}
PROMPT_ROWS = {"train": {"where": 2000, "count": 2000}, "test": {"where": 100, "count": 100}}
SIMPLE_ROWS = {"train": {"colour": 1500, "describe": 3000}, "test": {"colour": 150, "describe": 150}}

_CELL = IMAGE_SIZE // 3
_SIZES = (14, 15, 16)  # pixels across; with smaller ones the form is learnt late
_SIMPLE = 2  # shapes at most in a picture of `builtin/shapes-simple`
_HELD_OUT = 8  # one layout in so many is held out


class Shape(NamedTuple):
    """One shape of a layout; `cell` counts 0..8 from the top left, row by row."""

    cell: int
    form: str
    colour: str


Layout = tuple[Shape, ...]  # sorted by cell


def load(split: str, seed: int = 0) -> Dataset:
    """Draw the "train" or "test" rows; the same seed gives the same bytes."""
    return to_dataset(_draw("shapes", split, TRAIN_ROWS if split == "train" else TEST_ROWS, seed))


def load_prompts(split: str, seed: int = 0) -> Dataset:
    """Rows of `images`, `prompt` (a chat of one turn), `solution` and `kind`: where, and how many; to reward by."""
    return to_prompts(_draw("shapes-prompts", split, PROMPT_ROWS[split], seed))


def load_simple(split: str, seed: int = 0) -> Dataset:
    """Rows as those of `load`, of fewer kinds and pictures with one or two shapes: learnt in a third of the steps."""
    return to_dataset(_draw("shapes-simple", split, SIMPLE_ROWS[split], seed, most=_SIMPLE))


def _draw(name: str, split: str, rows_of_kind: Mapping[str, int], seed: int, most: int = len(FORMS)) -> list[Question]:
    rng = random.Random(f"{name} {split} {seed}")
    kinds = [kind for kind, rows in rows_of_kind.items() for _ in range(rows)]
    rng.shuffle(kinds)
    return [draw_question(kind, split, rng, most) for kind in kinds]


def draw_question(kind: str, split: str, rng: random.Random, most: int = len(FORMS)) -> Question:
    """Draw a layout of the split on which this kind of question has one right answer; ask and paint it."""
    while True:
        layout = draw_layout_of(split, rng, most)
        asked = ask(kind, layout, rng)
        if asked is not None:
            return Question(png(paint(layout, rng)), *asked, kind)


def draw_layout_of(split: str, rng: random.Random, most: int = len(FORMS)) -> Layout:
    """A layout of the split, of so many shapes at most."""
    while True:
        layout = draw_layout(rng)
        if len(layout) <= most and split_of(layout) == split:
            return layout


def draw_layout(rng: random.Random) -> Layout:
    """One to three shapes in different cells, all of different form; colours may repeat."""
    n = rng.randint(1, 3)
    cells, forms = rng.sample(range(9), n), rng.sample(FORMS, n)
    return tuple(sorted(Shape(cell, form, rng.choice(list(COLOURS))) for cell, form in zip(cells, forms, strict=True)))


def lay(shapes: Sequence[tuple[str, str]], rng: random.Random) -> Layout:
    """Shapes, form and colour of each, in any cells, in the order in which they are given."""
    cells = sorted(rng.sample(range(9), len(shapes)))
    return tuple(Shape(cell, *shape) for cell, shape in zip(cells, shapes, strict=True))


def split_of(layout: Layout) -> str:
    """Which split a layout belongs to: a property of the layout alone."""
    digest = blake2b(repr([tuple(shape) for shape in layout]).encode(), digest_size=4).digest()
    return "test" if int.from_bytes(digest, "big") % _HELD_OUT == 0 else "train"


def ask(kind: str, layout: Layout, rng: random.Random) -> tuple[str, str] | None:
    """A question of this kind and its answer, or None where the layout allows none with one right answer."""
    colours = [shape.colour for shape in layout]
    target = rng.choice(layout)
    match kind:
        case "colour":
            return f"What colour is the {target.form}?", target.colour
        case "shape":
            if colours.count(target.colour) > 1:
                return None
            return f"What shape is {target.colour}?", target.form
        case "where":
            return f"Where is the {target.form}?", PLACES[target.cell]
        case "count":
            if rng.random() < 0.5:
                return "How many shapes are there?", COUNTS[len(layout)]
            colour = rng.choice([*colours, rng.choice(list(COLOURS))])
            return f"How many {colour} shapes are there?", COUNTS[colours.count(colour)]
        case "describe":
            # Form before colour: with the other order, or both, binding is learnt late or not at all.
            return "Describe the image.", " ".join(f"{shape.form} {shape.colour}" for shape in layout)
    raise ValueError(f"unknown kind of question {kind!r}")


def paint(layout: Layout, rng: random.Random) -> np.ndarray:
    """The picture (48, 48, 3) uint8 of a layout; `rng` varies the size of each shape and its place in the cell."""
    picture = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for shape in layout:
        size = rng.choice(_SIZES)
        row, column = divmod(shape.cell, 3)
        y = row * _CELL + rng.randint(0, _CELL - size)
        x = column * _CELL + rng.randint(0, _CELL - size)
        picture[y : y + size, x : x + size] = sprite(shape.form, shape.colour, size)
    return picture


@cache
def sprite(form: str, colour: str, size: int) -> np.ndarray:
    """A shape on black, (size, size, 3) uint8."""
    return (cover(form, size)[..., None] * np.array(COLOURS[colour], np.float32)).round().astype(np.uint8)


@cache
def cover(form: str, size: int) -> np.ndarray:
    """The share of each pixel that a shape covers, (size, size) float32; a form other than the known is a cross."""
    scale = 8  # drawn large and averaged down, for smooth edges
    last = size * scale - 1
    mask = Image.new("L", (size * scale, size * scale))
    draw = ImageDraw.Draw(mask)
    if form == "circle":
        draw.ellipse((0, 0, last, last), fill=255)
    elif form == "square":
        draw.rectangle((0, 0, last, last), fill=255)
    elif form == "triangle":
        draw.polygon([(0, last), (last, last), (last // 2, 0)], fill=255)
    else:
        arm = (last + 1) // 3
        draw.rectangle((arm, 0, last - arm, last), fill=255)
        draw.rectangle((0, arm, last, last - arm), fill=255)
    return np.asarray(mask.resize((size, size), Image.Resampling.BOX), np.float32) / 255
