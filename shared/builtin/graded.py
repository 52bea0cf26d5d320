"""`builtin/reviews-graded`: pairs of reviews of one film, sound and spoilt, ordered by the judge of `builtin/reviews`.

A reward model that is trained on positive against negative reviews alone has seen no broken one, and a policy that is
trained against it finds those that it likes by mistake. Here a pair is two reviews that are drawn apart from each
other, or a review and a spoilt copy of it; both may be spoilt. The chosen one has the higher `reviews.score`; pairs
that it hardly tells apart are drawn again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from shared.builtin import reviews
from shared.builtin.exchanges import assistant, to_dataset, user

if TYPE_CHECKING:
    from datasets import Dataset

ROWS = {"train": 16000, "test": 400}
PLAIN = 0.7  # share of the draws that are as those of `builtin/reviews`
POSITIVE = 0.7  # share of these: the judge scarcely tells a negative review from a spoilt copy
SENTENCES = (1, 2, 2, 2, 3, 3, 3, 4, 5)  # of the other draws
SPOILT = 0.5  # share of the reviews that are drawn apart from each other
COPIED = 0.65  # share of the pairs with a spoilt copy
GAP = 0.1  # of the scores in a pair
SCALE = 4.0  # margin for a difference of 1 in score


def load(split: str, seed: int = 0) -> Dataset:
    """Rows of `prompt`, `chosen`, `rejected` (chats) and `margin` (the scores' difference times `SCALE`)."""
    rng = random.Random(f"reviews-graded {split} {seed}")
    films = reviews.films(split)
    columns: dict[str, list] = {"prompt": [], "chosen": [], "rejected": [], "margin": []}
    while len(columns["prompt"]) < ROWS[split]:
        film = rng.choice(films)
        prompt = reviews.PROMPT.format(film=film)
        first, second = draw_pair(film, rng)
        gap = reviews.score(prompt, first) - reviews.score(prompt, second)
        if abs(gap) < GAP:
            continue
        better, worse = (first, second) if gap > 0 else (second, first)
        values = ([user(prompt)], [assistant(better)], [assistant(worse)], SCALE * abs(gap))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return to_dataset(columns)


def draw_pair(film: str, rng: random.Random) -> tuple[str, str]:
    """A review and a spoilt copy of it, or two reviews either of which may be spoilt."""
    first = draw(film, rng)
    if rng.random() < COPIED:
        return first, spoil(first, film, rng)
    second = draw(film, rng)
    return tuple(spoil(review, film, rng) if rng.random() < SPOILT else review for review in (first, second))


def draw(film: str, rng: random.Random) -> str:
    """A review by the rule of `builtin/reviews`, or one mixed in sentiment whose words and forms may come again."""
    if rng.random() < PLAIN:
        return reviews.write(film, rng.random() < POSITIVE, rng.randint(2, 3), rng)
    kinds = [reviews.FORMS[0], *rng.choices(reviews.FORMS[1:], k=rng.choice(SENTENCES) - 1)]
    lean = rng.random()  # the share of the words that are positive
    said = []
    for form in kinds:
        wanted = rng.random() < lean
        words = {
            kind: rng.choice([word for word, value in words.items() if (value > 0) == wanted] or list(words))
            for kind, words in reviews.WORDS.items()
        }
        said.append(form.format(film=film, aspect=rng.choice(reviews.ASPECTS), **words))
    return " ".join(said)


def spoil(review: str, film: str, rng: random.Random) -> str:
    """Spoil a review in one way of `WAYS`, or in two."""
    for way in rng.choices(list(WAYS), list(WAYS.values()), k=rng.choice((1, 1, 2))):
        review = way(review, film, rng) or review  # nothing at all is no row of a data set
    return review


def repeat(review: str, film: str, rng: random.Random) -> str:
    """Sentences come again."""
    sentences = _sentences(review)
    return " ".join([*sentences, *rng.choices(sentences, k=rng.choice((1, 1, 2, 4)))])


def lengthen(review: str, film: str, rng: random.Random) -> str:
    """It goes on and on."""
    return " ".join([review, *_sentences(draw(film, rng))[1:], *_sentences(draw(film, rng))[1:]])


def misname(review: str, film: str, rng: random.Random) -> str:
    """It is about another film, or about none."""
    _, adjective, noun = film.split()
    others = (rng.choice(reviews.NAME_ADJECTIVES), rng.choice(reviews.NAME_NOUNS))
    names = (f"{others[0]} {noun}", f"{adjective} {others[1]}", " ".join(others), rng.choice(reviews.ASPECTS))
    return review.replace(film, rng.choice((*(f"The {name}" for name in names), "It")))


def leave_out(review: str, film: str, rng: random.Random) -> str:
    """A sentence is missing."""
    sentences = _sentences(review)
    sentences.pop(rng.choice((0, rng.randrange(len(sentences)))))
    return " ".join(sentences)


def cut(review: str, film: str, rng: random.Random) -> str:
    """It stops anywhere, or without a full stop."""
    words = review.split()
    kept = rng.choice((len(words), rng.randint(1, len(words))))
    return " ".join(words[:kept]).removesuffix(".")


def replace_words(review: str, film: str, rng: random.Random) -> str:
    """Some words are others."""
    words = review.split()
    for at in rng.choices(range(len(words)), k=rng.choice((1, 1, 2, 3))):
        end = "." if words[at].endswith(".") and rng.random() < 0.8 else ""
        words[at] = rng.choice(_VOCABULARY) + end
    return " ".join(words)


def double_words(review: str, film: str, rng: random.Random) -> str:
    """A word comes several times."""
    words = review.split()
    at = rng.randrange(len(words))
    return " ".join([*words[:at], *words[at : at + 1] * rng.randint(2, 4), *words[at + 1 :]])


def shuffle(review: str, film: str, rng: random.Random) -> str:
    """The words of a sentence are in another order."""
    sentences = _sentences(review)
    at = rng.randrange(len(sentences))
    words = sentences[at].removesuffix(".").split()
    sentences[at] = " ".join(rng.sample(words, len(words))) + "."
    return " ".join(sentences)


def list_words(review: str, film: str, rng: random.Random) -> str:
    """Words of praise in a row."""
    praise = [word for word, value in reviews.LEXICON.items() if value > 0]
    listed = " ".join(rng.choices(praise, k=rng.randint(2, 12)))
    return rng.choice((listed, f"{review} {listed}.", f"{film} is a {listed} film. {review}", f"{film} {listed}."))


# Way -> how often. That the name has to be compared with the prompt's is learnt from many such pairs, or not in time.
WAYS: Mapping[Callable[[str, str, random.Random], str], int] = {
    repeat: 1,
    lengthen: 1,
    misname: 22,
    leave_out: 1,
    cut: 2,
    replace_words: 2,
    double_words: 1,
    shuffle: 1,
    list_words: 1,
}
_VOCABULARY = (
    *reviews.LEXICON, *reviews.ASPECTS, *reviews.NAME_NOUNS, *reviews.NAME_ADJECTIVES,
    "The", "the", "I", "It", "it", "is", "not", "never", "cannot", "a", "film", "at", "all",
)  # fmt: skip


def _sentences(review: str) -> list[str]:
    return [part.strip() for part in re.findall(r"[^.]+\.?", review) if part.strip()]
