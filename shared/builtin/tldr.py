"""`builtin/tldr` and its prompts: short posts that ask for advice, one-sentence summaries, and the rule to judge them.

The rule of the data: a post has six *facts* (`SLOTS`), in the sentences of `TOLD`, among up to two sentences of
`ASIDE`, which name other people, places, things and times that do not belong into the summary; the question comes
last. A full summary is `SUMMARY` filled with the facts. Of those of `builtin/tldr` most are careless ones that leave
`CLAUSES` out, so that a model that learns from them copies well, but seldom tells all. Posts belong to a split by the
hash of their facts. Prompts are plain text that ends in `TL;DR:`, and the summary continues it.

The rule of the judge is `score`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from shared.builtin.exchanges import split_of, to_dataset
from shared.builtin.reviews import NAME_ADJECTIVES, NAME_NOUNS

if TYPE_CHECKING:
    from datasets import Dataset

SLOTS: Mapping[str, tuple[str, ...]] = {
    "who": ("son", "mum", "dad", "aunt", "cousin", "wife"),
    "act": ("lost", "sold", "hid", "took", "painted"),
    "thing": ("car", "hat", "bed", "cup", "tent", "boat", "ring"),
    "place": tuple(f"{adjective} {noun}" for adjective in NAME_ADJECTIVES for noun in NAME_NOUNS),
    "time": ("Winter", "Summer", "May", "March"),
    "advice": ("go", "sue", "move", "pay", "ask", "call", "run"),
}
TOLD = ("My {who} {act} my {thing}.", "We met at {place}.", "It was in {time}.", "Should I {advice}?")
ASIDE = (
    "My {who} was not there.",
    "I have a {thing}.",
    "I never saw {place}.",
    "I hated {time}.",
    "I cannot {advice}.",
    "It is painful.",
)
SUMMARY = "My {who} {act} my {thing} at {place} in {time}; should I {advice}?"
CLAUSES = (" at {place}", " in {time}", "; should I {advice}")  # of a summary, which may lack each
CARELESS = 0.6  # share of the summaries of `builtin/tldr` that lack all of them
PROMPT = "POST: {post}\nTL;DR:"
FAULT = 0.5  # what a fault costs

ROWS = {"train": 4000, "test": 200}


class Post(NamedTuple):
    """A post and its facts, in the order of `SLOTS`."""

    text: str
    facts: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return PROMPT.format(post=self.text)

    @property
    def summary(self) -> str:
        return SUMMARY.format(**dict(zip(SLOTS, self.facts, strict=True)))

    @property
    def careless_summary(self) -> str:
        """The summary without `CLAUSES`: right, but it tells only half of the facts."""
        return SUMMARY.replace("".join(CLAUSES) + "?", ".").format(**dict(zip(SLOTS, self.facts, strict=True)))


def load(split: str, seed: int = 0) -> Dataset:
    """Rows of `prompt` (a post, as text) and `completion` (a summary of it, right but often careless)."""
    drawn, rng = list(_draw("tldr", split, seed)), random.Random(f"tldr {split} {seed} summaries")
    summaries = [post.careless_summary if rng.random() < CARELESS else post.summary for post in drawn]
    return to_dataset(
        {"prompt": [post.prompt for post in drawn], "completion": [f" {summary}" for summary in summaries]}
    )


def load_prompts(split: str, seed: int = 0) -> Dataset:
    """Rows of `prompt` (a post, as text; other posts than those of `load`) and `facts` (what to reward by)."""
    drawn = list(_draw("tldr-prompts", split, seed))
    return to_dataset({"prompt": [post.prompt for post in drawn], "facts": [list(post.facts) for post in drawn]})


def write(rng: random.Random) -> Post:
    """Draw a post by the rule of the data; what its asides name is not among its facts."""
    facts = {slot: rng.choice(words) for slot, words in SLOTS.items()}
    other = {slot: rng.choice([word for word in words if word != facts[slot]]) for slot, words in SLOTS.items()}
    *told, question = (form.format(**facts) for form in TOLD)
    said = told + [form.format(**other) for form in rng.sample(ASIDE, rng.randint(0, 2))]
    rng.shuffle(said)
    return Post(" ".join([*said, question]), tuple(facts.values()))


def score(prompt: str, answer: str) -> float:
    """Judge a summary by the post that it is of.

    A summary is worth (facts that it has right - facts that it has wrong) / 6, read from its first sentence, which
    must be `SUMMARY`, of which `CLAUSES` may be left out. Each of these faults costs 0.5: the first sentence is no
    such sentence (and is worth nothing); more follows it; the answer does not end with the end of a sentence. So a
    copy of the post and a list of words score below the shortest right summary, and a guess that is more often wrong
    than right below none.

    Args:
        prompt: the post, as text or as a rendered chat.
        answer: the summary as it was generated, without special tokens.

    Returns:
        The score, from -1 to 1.

    Example:
        Of a son who lost a car at Golden Hill in May, "My son lost my car in March." has three facts right and one
        wrong: (3 - 1) / 6 = 0.33.
    """
    return grade(read(prompt), answer)


def grade(facts: Sequence[str], answer: str) -> float:
    """As `score`, by the facts of the post in the order of `SLOTS`."""
    first, rest = re.fullmatch(r"\s*([^.?!]*[.?!]?)(.*)", answer, re.DOTALL).groups()
    stated = _pattern(SUMMARY).fullmatch(first)
    found = (not stated) + bool(rest.strip()) + (not answer.rstrip().endswith((".", "?", "!")))
    said = stated.groupdict() if stated else {}
    worth = [1 if said[slot] == fact else -1 for slot, fact in zip(SLOTS, facts, strict=True) if said.get(slot)]
    return max(-1.0, sum(worth) / len(SLOTS) - FAULT * found)


def summary_reward(prompts: Sequence[Any], completions: Sequence[Any], facts: Sequence[Any], **_: Any) -> list[float]:
    """`grade` as a reward function, for rows of `builtin/tldr-prompts`.

    Args:
        prompts: not looked at.
        completions: summaries, as text or as chats of one turn.
        facts: the posts' facts, in the order of `SLOTS`.
    """
    texts = (each if isinstance(each, str) else each[0]["content"] for each in completions)
    return [grade(known, text) for known, text in zip(facts, texts, strict=True)]


def read(prompt: str) -> tuple[str, ...]:
    """The facts of a post, in the order of `SLOTS`; "" for what it does not tell."""
    told = [_pattern(form).search(prompt) for form in TOLD]
    facts = {slot: word for found in told if found for slot, word in found.groupdict().items()}
    return tuple(facts.get(slot, "") for slot in SLOTS)


@cache
def _pattern(form: str) -> re.Pattern:
    """Matches a form filled with any words of its slots; of a summary also one that lacks some of `CLAUSES`."""
    pattern = re.escape(form)
    if form is SUMMARY:
        for clause in map(re.escape, CLAUSES):
            pattern = pattern.replace(clause, f"(?:{clause})?")
        pattern = pattern.removesuffix(r"\?") + "[.?]"
    words = {slot: f"(?P<{slot}>{'|'.join(known)})" for slot, known in SLOTS.items()}
    return re.compile(re.sub(r"\\\{(\w+)\\\}", lambda slot: words[slot[1]], pattern))


def _draw(name: str, split: str, seed: int) -> Iterator[Post]:
    rng = random.Random(f"{name} {split} {seed}")
    left = ROWS[split]
    while left:
        post = write(rng)
        if split_of(" ".join(post.facts)) == split:
            left -= 1
            yield post
