"""`builtin/arithmetic`: sums, differences and products of small numbers, asked in a few phrasings.

A *problem* is an operation and two numbers in order. It belongs by its hash to the training or to the held-out set, in
all phrasings, so a held-out answer has to be worked out and cannot be looked up; that holds for the mirrored problem
too, for `3 + 5` and `5 + 3` have one hash. Each problem is asked once, in a phrasing drawn from the seed; products,
which are few, are asked in all phrasings for training. Small models learn the products, but work out new ones badly.

The rule: addition of two numbers from 0 to 99 whose sum is at most 99; subtraction of a number from 0 to 99 from one
that is not smaller; multiplication of a number from 0 to 99 by one from 2 to 5. No answer is negative.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from shared.builtin.exchanges import assistant, split_of, to_dataset, user

if TYPE_CHECKING:
    from datasets import Dataset

LARGEST = 99  # the largest operand, and the largest sum
FACTORS = (2, 3, 4, 5)
OPERATIONS = {  # kind -> sign, word, function
    "addition": ("+", "plus", operator.add),
    "subtraction": ("-", "minus", operator.sub),
    "multiplication": ("*", "times", operator.mul),
}
PHRASINGS = ("What is {a} {sign} {b}?", "Compute {a} {sign} {b}.", "{a} {sign} {b} =", "How much is {a} {word} {b}?")
TEST_ROWS = {"addition": 200, "subtraction": 200, "multiplication": 50}


class Problem(NamedTuple):
    """E.g. `Problem("addition", 3, 5)`."""

    kind: str
    a: int
    b: int

    @property
    def solution(self) -> str:
        return str(OPERATIONS[self.kind][2](self.a, self.b))

    @property
    def split(self) -> str:
        pair = (self.a, self.b) if self.kind == "subtraction" else tuple(sorted((self.a, self.b)))
        return split_of(f"{self.kind} {pair}")

    def ask(self, phrasing: str) -> str:
        sign, word, _ = OPERATIONS[self.kind]
        return phrasing.format(a=self.a, b=self.b, sign=sign, word=word)


def load(split: str, seed: int = 0) -> Dataset:
    """Rows of `messages` (a question and its answer), `kind` (the operation) and `solution` (the answer)."""
    drawn = _draw(split, seed)
    return to_dataset(
        {
            "messages": [[user(question), assistant(problem.solution)] for problem, question in drawn],
            "kind": [problem.kind for problem, _ in drawn],
            "solution": [problem.solution for problem, _ in drawn],
        }
    )


def load_prompts(split: str, seed: int = 0) -> Dataset:
    """The rows of `load` without answers: `prompt` (a chat of one turn), `kind` and `solution`, to reward by."""
    drawn = _draw(split, seed)
    return to_dataset(
        {
            "prompt": [[user(question)] for _, question in drawn],
            "kind": [problem.kind for problem, _ in drawn],
            "solution": [problem.solution for problem, _ in drawn],
        }
    )


def problems() -> Iterator[Problem]:
    """All problems that the rule allows."""
    for a in range(LARGEST + 1):
        for b in range(LARGEST + 1 - a):
            yield Problem("addition", a, b)
        for b in range(a + 1):
            yield Problem("subtraction", a, b)
        for factor in FACTORS:
            yield Problem("multiplication", a, factor)


def _draw(split: str, seed: int) -> list[tuple[Problem, str]]:
    """The split's problems with their questions in random order; of the held-out ones `TEST_ROWS` of each kind."""
    rng = random.Random(f"arithmetic {split} {seed}")
    drawn: list[tuple[Problem, str]] = []
    for kind in OPERATIONS:
        of_kind = [problem for problem in problems() if problem.kind == kind and problem.split == split]
        if split == "test":
            of_kind = rng.sample(of_kind, TEST_ROWS[kind])
        asked = len(PHRASINGS) if kind == "multiplication" and split == "train" else 1
        drawn += [(each, each.ask(phrasing)) for each in of_kind for phrasing in rng.sample(PHRASINGS, asked)]
    rng.shuffle(drawn)
    return drawn
