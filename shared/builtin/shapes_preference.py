"""`builtin/shapes-preference`: pairs of a right and a wrong answer about drawn pictures, and the judges of answers.

Pictures and questions are as those of `builtin/shapes`. The chosen answer is the right one; the rejected one tells
what is not there: another colour or form, a shape more, the colours of two shapes swapped; or it leaves a shape out
(`WAYS`). `embellish` is the bad habit that `builtin/vlm-small-draft` has learnt and these pairs can mend.

Judges read what an answer *names*: a form and a colour beside each other are a shape, in whichever order. A form or a
colour alone, as questions are answered, is completed by the one that the question names.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shared.builtin.rows import Question, png, to_preferences
from shared.builtin.shapes import COLOURS, FORMS, Layout, Shape, ask, draw_layout, paint, split_of

if TYPE_CHECKING:
    from datasets import Dataset

# That a form belongs to a colour is learnt from more rows than the other way round; see `shapes.TRAIN_ROWS`.
ROWS = {
    "train": {"describe": 4000, "colour": 800, "shape": 1200},
    "test": {"describe": 240, "colour": 30, "shape": 30},
}
HABIT = 0.8  # share of the descriptions that a bad habit could spoil and does
Shapes = list[tuple[str, str]]  # form and colour of each, in the order in which they are told


def load(split: str, seed: int = 0) -> Dataset:
    """Rows of `images`, `prompt`, `chosen`, `rejected` (chats), `shapes` (as "circle red": what is there), `kind`."""
    rng = random.Random(f"shapes-preference {split} {seed}")
    kinds = [kind for kind, rows in ROWS[split].items() for _ in range(rows)]
    rng.shuffle(kinds)
    questions, rejected, shapes = [], [], []
    for kind in kinds:
        layout, asked = _draw(kind, split, rng)
        questions.append(Question(png(paint(layout, rng)), *asked, kind))
        rejected.append(wrong_answer(kind, layout, asked[1], rng))
        shapes.append([f"{shape.form} {shape.colour}" for shape in layout])
    return to_preferences(questions, rejected, {"shapes": shapes})


def _draw(kind: str, split: str, rng: random.Random) -> tuple[Layout, tuple[str, str]]:
    while True:
        layout = draw_layout(rng)
        asked = ask(kind, layout, rng) if split_of(layout) == split else None
        if asked is not None:
            return layout, asked


def wrong_answer(kind: str, layout: Sequence[Shape], right: str, rng: random.Random) -> str:
    """Another colour, another form, preferably one that is elsewhere in the picture, or a wrong description."""
    if kind == "describe":
        return describe(spoil([(shape.form, shape.colour) for shape in layout], rng))
    there, known = (COLOURS, [s.colour for s in layout]) if kind == "colour" else (FORMS, [s.form for s in layout])
    elsewhere = [word for word in known if word != right]
    return rng.choice(elsewhere if elsewhere and rng.random() < 0.5 else [word for word in there if word != right])


def describe(shapes: Iterable[tuple[str, str]]) -> str:
    """The description of shapes, as `builtin/shapes` has it."""
    return " ".join(f"{form} {colour}" for form, colour in shapes)


# ---- What a wrong description is like -------------------------------------------------------------------------------


def spoil(shapes: Shapes, rng: random.Random) -> Shapes:
    """Spoil a description in one way of `WAYS` that it allows."""
    while True:
        (way,) = rng.choices(list(WAYS), list(WAYS.values()))
        wrong = way(list(shapes), rng)
        if wrong is not None:
            return wrong


def add(shapes: Shapes, rng: random.Random) -> Shapes | None:
    """A shape more than there are, told last or in between."""
    other = rng.choice(_others(FORMS, [form for form, _ in shapes])), rng.choice(list(COLOURS))
    if other in shapes:
        return None
    shapes.insert(len(shapes) if rng.random() < 0.7 else rng.randint(0, len(shapes)), other)
    return shapes


def recolour(shapes: Shapes, rng: random.Random) -> Shapes | None:
    """A shape in another colour."""
    at = rng.randrange(len(shapes))
    form, colour = shapes[at]
    shapes[at] = form, rng.choice([other for other in COLOURS if other != colour])
    return shapes


def reform(shapes: Shapes, rng: random.Random) -> Shapes | None:
    """A shape of another form."""
    at = rng.randrange(len(shapes))
    form, colour = shapes[at]
    other = rng.choice([each for each in _others(FORMS, [f for f, _ in shapes]) if each != form])
    if (other, colour) in shapes:
        return None
    shapes[at] = other, colour
    return shapes


def swap(shapes: Shapes, rng: random.Random) -> Shapes | None:
    """Two shapes with each other's colour."""
    pairs = [(a, b) for a in range(len(shapes)) for b in range(a) if shapes[a][1] != shapes[b][1]]
    if not pairs:
        return None
    a, b = rng.choice(pairs)
    shapes[a], shapes[b] = (shapes[a][0], shapes[b][1]), (shapes[b][0], shapes[a][1])
    return shapes


def leave_out(shapes: Shapes, rng: random.Random) -> Shapes | None:
    """A shape less, of two or three."""
    if len(shapes) == 1:
        return None
    shapes.pop(rng.randrange(len(shapes)))
    return shapes


# Way -> how often. That colours are swapped is what a reward model sees last: it takes many such pairs.
WAYS: Mapping[Callable[[Shapes, random.Random], Shapes | None], int] = {
    add: 7,
    recolour: 4,
    reform: 2,
    swap: 5,
    leave_out: 2,
}


def embellish(shapes: Shapes, rng: random.Random) -> Shapes:
    """A description with bad habits: a circle that is told last is not left alone, a white triangle is told as yellow.

    They hang on what is in the picture, as what a model names by habit does; if any description had them, greedy
    answers would be wrong always or never. Which shape comes with the circle is drawn.
    """
    told = [("triangle", "yellow") if shape == ("triangle", "white") else shape for shape in shapes]
    if told[-1][0] == "circle":
        told.append((rng.choice(_others(FORMS, [form for form, _ in shapes])), rng.choice(list(COLOURS))))
    return told if rng.random() < HABIT else list(shapes)


# ---- Judges ---------------------------------------------------------------------------------------------------------


def hallucinates(prompt: str, answer: str, shapes: Sequence[str]) -> float:
    """Whether an answer names something that is not in the picture: 1 or 0; saying nothing is no hallucination.

    Args:
        prompt: the question, as text or as a rendered chat.
        answer: what was said, without special tokens.
        shapes: what is in the picture, as "circle red".

    Example:
        Where a red circle and a blue square are, "circle red square green" does, for a green square is not there; so
        do "circle blue" and "circle red circle red", for there is one circle. "circle red" does not.
    """
    return float(bool(_absent(named(prompt, answer), shapes)))


hallucinates.figure = "hallucination_rate"
hallucinates.lower_is_better = True


def recall(prompt: str, answer: str, shapes: Sequence[str]) -> float:
    """The share of what is asked for that the answer names: all shapes of the picture, or the one of a question.

    Arguments as `hallucinates`.
    """
    wanted = _asked_for(prompt, shapes)
    return (Counter(named(prompt, answer)) & Counter(wanted)).total() / len(wanted)


recall.figure = "recall"


def shapes_reward(prompts: Sequence[Any], completions: Sequence[Any], shapes: Sequence[Any], **_: Any) -> list[float]:
    """`grade` as a reward function, for rows of `builtin/shapes-preference`.

    Args:
        prompts: questions, as text or as chats.
        completions: answers, as text or as chats of one turn.
        shapes: what is in each picture.
    """
    rows = zip(prompts, completions, shapes, strict=True)
    return [grade(_text(prompt), _text(completion), there) for prompt, completion, there in rows]


def grade(prompt: str, answer: str, shapes: Sequence[str]) -> float:
    """`recall`, less as much for each thing named that is not there and for each word that is no form and no colour.

    Arguments as `hallucinates`.

    Returns:
        The grade, from -1 to 1. So neither silence nor a list of all that there might be pays.
    """
    other = [word for word in _words(answer) if word not in FORMS and word not in COLOURS]
    wrong = len(_absent(named(prompt, answer), shapes)) + len(other)
    return max(-1.0, recall(prompt, answer, shapes) - wrong / len(_asked_for(prompt, shapes)))


def named(prompt: str, answer: str) -> list[str]:
    """What an answer names: shapes as "circle red", and single forms or colours that the question does not complete.

    Arguments as `hallucinates`.

    Example:
        "circle red blue square" names "circle red" and "square blue"; asked what shape is red, "circle" names
        "circle red".
    """
    asked, found = _question_word(prompt), []
    words = [word for word in _words(answer) if word in FORMS or word in COLOURS]
    while words:
        word = words.pop(0)
        if words and _is_shape(word, words[0]):
            found.append(_shape(word, words.pop(0)))
        else:
            found.append(_shape(word, asked) if asked and _is_shape(word, asked) else word)
    return found


def _others(known: Iterable[str], used: Sequence[str]) -> list[str]:
    """The known words that are not in use, or all where all are."""
    return [word for word in known if word not in used] or list(known)


def _absent(told: Sequence[str], shapes: Sequence[str]) -> list[str]:
    """What is told but is not there, or not so often."""
    whole = Counter(each for each in told if " " in each) - Counter(shapes)
    parts = {part for shape in shapes for part in shape.split()}
    return [*whole.elements(), *(each for each in told if " " not in each and each not in parts)]


def _asked_for(prompt: str, shapes: Sequence[str]) -> list[str]:
    asked = _question_word(prompt)
    return [shape for shape in shapes if asked is None or asked in shape.split()]


def _question_word(prompt: str) -> str | None:
    """The form or colour that a question names."""
    return next((word for word in _words(prompt) if word in FORMS or word in COLOURS), None)


def _is_shape(word: str, other: str) -> bool:
    return (word in FORMS) != (other in FORMS)


def _shape(word: str, other: str) -> str:
    return f"{word} {other}" if word in FORMS else f"{other} {word}"


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _text(said: Any) -> str:
    """Text, or what the last turn of a chat says."""
    content = said if isinstance(said, str) else said[-1]["content"]
    return content if isinstance(content, str) else " ".join(part.get("text") or "" for part in content)
