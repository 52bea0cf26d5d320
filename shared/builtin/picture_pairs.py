"""`builtin/picture-pairs`: questions over two pictures, each named in the text where it stands.

The pictures are those of `builtin/shapes` with one shape. Which split a picture belongs to is decided there, by its
layout alone, so no picture of a held-out row is in a training row of either data set.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from shared.builtin import shapes
from shared.builtin.rows import Question, png, to_dataset
from shared.builtin.shapes import FORMS, Layout, paint

if TYPE_CHECKING:
    from datasets import Dataset

# Rows of each kind. Telling what is in each picture is what makes the model learn which picture it is asked about.
TRAIN_ROWS = {"which": 2500, "both": 300, "in one": 1000, "in each": 1500}
TEST_ROWS = {"which": 100, "both": 50, "in one": 100, "in each": 50}

_IN_ONE = ("colour", "shape")  # kinds of `builtin/shapes` that are asked of one of the pictures


def load(split: str, seed: int = 0) -> Dataset:
    """Draw the "train" or "test" rows; the same seed gives the same bytes."""
    rng = random.Random(f"picture-pairs {split} {seed}")
    kinds = [kind for kind, rows in (TRAIN_ROWS if split == "train" else TEST_ROWS).items() for _ in range(rows)]
    rng.shuffle(kinds)
    return to_dataset([draw_question(kind, split, rng) for kind in kinds])


def draw_question(kind: str, split: str, rng: random.Random) -> Question:
    """Draw pictures of the split on which this kind of question has one right answer; ask and paint them."""
    while True:
        layouts = draw_layouts(split, rng)
        asked = ask(kind, layouts, rng)
        if asked is not None:
            first, second = (png(paint(layout, rng)) for layout in layouts)
            return Question(first, f"Picture 1: <image> Picture 2: <image> {asked[0]}", asked[1], kind, (second,))


def draw_layouts(split: str, rng: random.Random) -> list[Layout]:
    """Two different layouts of the split, each of one shape."""
    first = second = shapes.draw_layout_of(split, rng, most=1)
    while second == first:
        second = shapes.draw_layout_of(split, rng, most=1)
    return [first, second]


def ask(kind: str, layouts: list[Layout], rng: random.Random) -> tuple[str, str] | None:
    """A question of this kind and its answer, or None where the pictures allow none with one right answer."""
    forms = [layout[0].form for layout in layouts]
    form = rng.choice(FORMS)
    match kind:
        case "which":
            return (f"Which picture shows the {form}?", str(forms.index(form) + 1)) if forms.count(form) == 1 else None
        case "both":
            return ("What is in both?", forms[0]) if forms[0] == forms[1] else None
        case "in one":
            number = rng.randint(1, len(layouts))
            question, answer = shapes.ask(rng.choice(_IN_ONE), layouts[number - 1], rng)
            return f"{question.removesuffix('?')} in picture {number}?", answer
        case "in each":
            told = (f"{number} {layout[0].form} {layout[0].colour}" for number, layout in enumerate(layouts, start=1))
            return "Describe the pictures.", " ".join(told)
    raise ValueError(f"unknown kind of question {kind!r}")
