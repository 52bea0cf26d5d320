"""`builtin/steps`: calculations worked out step by step, some steps wrong, each step labelled.

The rule: the prompt asks for a chain such as `7 + 5 - 3`; each step does its next operation on the result of the step
before. About three steps in ten get a wrong result, one to three away from the right one; the steps after it go on
from that result. A step's label says whether the step itself calculates rightly, whatever came before it: in
`7 + 5 = 13`, `13 - 3 = 10` the first is false and the second true. Chains belong to a split by their hash.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, NamedTuple

from shared.builtin.exchanges import split_of, to_dataset

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = {"train": 4000, "test": 200}
NUMBERS = (1, 6)  # of what is added and subtracted
LARGEST = 12  # of the results of right steps
WRONG = 0.3  # share of the steps


class Worked(NamedTuple):
    """A chain, the steps that work it out, and whether each is right."""

    chain: str
    steps: list[str]
    labels: list[bool]


def load(split: str, seed: int = 0) -> Dataset:
    """Rows of `prompt` (a string), `completions` (two to four steps) and `labels` (true where a step is right)."""
    rng = random.Random(f"steps {split} {seed}")
    drawn: dict[str, Worked] = {}
    while len(drawn) < ROWS[split]:
        worked = work(rng)
        if split_of(worked.chain) == split:
            drawn.setdefault(worked.chain, worked)
    return to_dataset(
        {
            "prompt": [f"Work out {worked.chain} step by step." for worked in drawn.values()],
            "completions": [worked.steps for worked in drawn.values()],
            "labels": [worked.labels for worked in drawn.values()],
        }
    )


def work(rng: random.Random) -> Worked:
    """Draw a chain of two to four additions and subtractions and work it out with some errors."""
    value = rng.randint(*NUMBERS)
    chain, steps, labels = str(value), [], []
    for _ in range(rng.randint(2, 4)):
        number = rng.randint(*NUMBERS)
        # `value` may be a wrong one; the chain is made on the way, so that no step leaves the range.
        add = value < number or (value + number <= LARGEST and rng.random() < 0.5)
        right = value + number if add else value - number
        said = _miss(right, rng) if rng.random() < WRONG else right
        operation = f"{'+' if add else '-'} {number}"
        chain += f" {operation}"
        steps.append(f"{value} {operation} = {said}")
        labels.append(said == right)
        value = said
    return Worked(chain, steps, labels)


def _miss(right: int, rng: random.Random) -> int:
    return rng.choice([said for said in range(right - 3, right + 4) if said != right and said >= 0])
