"""`builtin/reviews` and its preference sets: reviews of made-up films, and the rule that judges a review.

The rule of the data: a film's name is `The`, an adjective and a noun; names belong to a split by their hash, so the
films of the held-out set are new. A review is positive or negative throughout: a sentence that names the film, and one
or two more of the forms in `FORMS`, filled with words of `LEXICON`; a sentence with a negation takes a word of the
opposite sentiment. No form and no sentiment word comes twice in a review. Half of the reviews are positive.

The rule of the judge is `score`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from shared.builtin.exchanges import assistant, split_of, to_dataset, user

if TYPE_CHECKING:
    from datasets import Dataset

NAME_ADJECTIVES = (
    "Silent",
    "Golden",
    "Broken",
    "Hidden",
    "Frozen",
    "Paper",
    "Winter",
    "Summer",
    "Iron",
    "Stone",
    "Marble",
    "Lunar",
    "Open",
    "Final",
    "Second",
    "Last",
    "Lost",
    "Red",
    "Blue",
    "Dark",
)
NAME_NOUNS = (
    "Garden",
    "River",
    "Letter",
    "Window",
    "Forest",
    "Bridge",
    "Station",
    "Castle",
    "Road",
    "Tower",
    "Door",
    "Train",
    "Island",
    "Mirror",
    "Crown",
    "Shadow",
    "Desert",
    "Valley",
    "Sea",
    "Hill",
)
ASPECTS = ("acting", "plot", "music", "ending", "dialogue", "pace")

# Word -> how positive it is, -1 to 1.
ADJECTIVES = {
    **dict.fromkeys(("brilliant", "wonderful", "superb", "moving", "gripping"), 1.0),
    **dict.fromkeys(("pleasant", "charming", "clever", "funny", "solid"), 0.5),
    **dict.fromkeys(("dull", "weak", "bland", "clumsy", "slow"), -0.5),
    **dict.fromkeys(("terrible", "dreadful", "boring", "tedious", "painful"), -1.0),
}
VERBS = {"loved": 1.0, "enjoyed": 0.5, "disliked": -0.5, "hated": -1.0}
ADVICE = {"recommend": 1.0}
WORDS = {"adjective": ADJECTIVES, "verb": VERBS, "advice": ADVICE}
LEXICON = ADJECTIVES | VERBS | ADVICE
NEGATIONS = ("not", "never", "cannot")
NEGATED = -0.5  # what a negation makes of a word's value: "not terrible" is less than "brilliant"

FORMS = (
    "{film} is a {adjective} film.",  # the form that names the film
    "The {aspect} is {adjective}.",
    "I {verb} the {aspect}.",
    "It is not {adjective} at all.",
    "The {aspect} is never {adjective}.",
    "I {advice} it.",
    "I cannot {advice} it.",
)
PROMPT = "Write a review of the film {film}."
SENTENCES = (2, 4)  # fewer or more than these are a fault; the data have two or three
FAULT = 0.5  # what a fault costs

ROWS = {"train": 3000, "test": 200}


def load(split: str, seed: int = 0) -> Dataset:
    """Rows of `messages` (the request and a review) and `kind` ("positive" or "negative", one half each)."""
    rng = random.Random(f"reviews {split} {seed}")
    messages, kinds = [], []
    for number in range(ROWS[split]):
        film, positive = _film(split, rng), number % 2 == 0
        review = write(film, positive, rng.randint(2, 3), rng)
        messages.append([user(PROMPT.format(film=film)), assistant(review)])
        kinds.append("positive" if positive else "negative")
    return to_dataset({"messages": messages, "kind": kinds})


def load_preference(split: str, seed: int = 0) -> Dataset:
    """Rows of `prompt`, `chosen` (a positive review), `rejected` (a negative one of the same forms), each a chat."""
    rng = random.Random(f"reviews-preference {split} {seed}")
    prompts, chosen, rejected = [], [], []
    for _ in range(ROWS[split]):
        film, sentences, drawn = _film(split, rng), rng.randint(2, 3), rng.random()
        prompts.append([user(PROMPT.format(film=film))])
        for column, positive in ((chosen, True), (rejected, False)):
            column.append([assistant(write(film, positive, sentences, random.Random(drawn)))])
    return to_dataset({"prompt": prompts, "chosen": chosen, "rejected": rejected})


def load_unpaired(split: str, seed: int = 0) -> Dataset:
    """Rows of `prompt`, `completion` (a review) and `label` (true where it is positive: one half)."""
    rng = random.Random(f"reviews-unpaired {split} {seed}")
    prompts, completions, labels = [], [], []
    for number in range(ROWS[split]):
        film, positive = _film(split, rng), number % 2 == 0
        prompts.append([user(PROMPT.format(film=film))])
        completions.append([assistant(write(film, positive, rng.randint(2, 3), rng))])
        labels.append(positive)
    return to_dataset({"prompt": prompts, "completion": completions, "label": labels})


def films(split: str) -> list[str]:
    """The names of a split's films."""
    names = (f"The {adjective} {noun}" for adjective in NAME_ADJECTIVES for noun in NAME_NOUNS)
    return [name for name in names if split_of(name) == split]


def write(film: str, positive: bool, sentences: int, rng: random.Random) -> str:
    """Write a review by the rule of the data."""
    advice = FORMS[5] if positive else FORMS[6]
    forms = [FORMS[0], *rng.sample([*FORMS[1:5], advice], sentences - 1)]
    aspects = rng.sample(ASPECTS, sentences)
    said: list[str] = []
    used: set[str] = set()
    for form, aspect in zip(forms, aspects, strict=True):
        kind = next(kind for kind in WORDS if f"{{{kind}}}" in form)
        if kind == "advice":
            word = "recommend"
        else:
            wanted = positive != any(negation in form.split() for negation in NEGATIONS)
            word = rng.choice([w for w, value in WORDS[kind].items() if (value > 0) == wanted and w not in used])
        said.append(form.format(film=film, aspect=aspect, **{kind: word}))
        used.add(word)
    return " ".join(said)


def score(prompt: str, answer: str) -> float:
    """Judge a review: how positive it is, less what is wrong with it.

    Each sentence is worth the mean value of its sentiment words (`LEXICON`), times -0.5 under a negation; a word
    counts only the first time it is used in the review. The review is worth the mean of its sentences. Each of these
    faults costs 0.5: a sentence that has none of the forms of `FORMS` (and is worth nothing) or comes again; the film
    that was asked for is not named; the answer does not end with the end of a sentence; it has fewer than two
    sentences or more than four. So repeating a good sentence or listing good words scores less than a plain review.

    Args:
        prompt: the request, as text or as the rendered chat; it holds `the film NAME.`.
        answer: the review as it was generated, without special tokens.

    Returns:
        The score, from -1 to 1.

    Example:
        Asked for The Silent Harbour, "The Silent Harbour is a superb film. The plot is not" has one sentence and an
        end that is missing: (1 + 0) / 2 - 0.5 (form) - 0.5 (end) = -0.5.
    """
    values, found = _read(prompt, answer)
    return max(-1.0, sum(values) / len(values) - FAULT * found)


def faults(prompt: str, answer: str) -> int:
    """How many of the faults that `score` names a review has."""
    return _read(prompt, answer)[1]


def _read(prompt: str, answer: str) -> tuple[list[float], int]:
    """The value of each sentence, and the number of faults."""
    asked = re.search(r"the film ([^.<]+)\.", prompt)
    film = asked.group(1) if asked else ""
    sentences = [part.strip() for part in re.findall(r"[^.]+\.?", answer) if part.strip()]
    values: list[float] = []
    used: set[str] = set()
    broken = 0
    for number, sentence in enumerate(sentences):
        sound = sentence not in sentences[:number] and _pattern(film).fullmatch(sentence)
        broken += not sound
        values.append(_value(sentence, used) if sound else 0.0)
    found = broken + (film not in answer) + (not answer.rstrip().endswith("."))
    return values or [0.0], found + (not SENTENCES[0] <= len(sentences) <= SENTENCES[1])


def _value(sentence: str, used: set[str]) -> float:
    """The mean value of a sentence's sentiment words, 0 for words that are in `used`; adds its words to it."""
    words = re.findall(r"\w+", sentence)
    values = [0.0 if word in used else LEXICON[word] for word in words if word in LEXICON]
    used.update(words)
    mean = sum(values) / len(values)  # each form has such a word
    return NEGATED * mean if any(word in NEGATIONS for word in words) else mean


@cache
def _pattern(film: str) -> re.Pattern:
    """Matches any sentence that one of the forms gives."""
    slots = {"film": [film], "aspect": ASPECTS, **WORDS}
    alternatives = {slot: f"(?:{'|'.join(map(re.escape, words))})" for slot, words in slots.items()}
    forms = (re.sub(r"\\\{(\w+)\\\}", lambda slot: alternatives[slot[1]], re.escape(form)) for form in FORMS)
    return re.compile("|".join(forms))


def _film(split: str, rng: random.Random) -> str:
    return rng.choice(_films(split))


@cache
def _films(split: str) -> tuple[str, ...]:
    return tuple(films(split))


def review_reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """`score` as a reward function.

    Args:
        prompts, completions: as texts or as chats; see shared.rewards.
    """
    texts = ((_said(prompt), _said(completion)) for prompt, completion in zip(prompts, completions, strict=True))
    return [score(prompt, completion) for prompt, completion in texts]


def positive_reward(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
    """1 for a review that `score` finds positive, else 0: its mean is their share.

    Args:
        prompts, completions: as of review_reward.
    """
    return [float(value > 0) for value in review_reward(prompts, completions)]


def _said(text: Any) -> str:
    return text if isinstance(text, str) else text[-1]["content"]
