"""Posts and their summaries: every post tells its facts once, and the judge cannot be had by cheap answers."""

import random

import pytest

import shared.builtin as builtin
from shared.builtin import tldr

POST = (
    "I never saw Dark Desert. My son hid my cup. I hated Summer. We met at Golden Hill. I have a hat. "
    "It was in March. I cannot go. Should I call?"
)
PROMPT = tldr.PROMPT.format(post=POST)
FACTS = ("son", "hid", "cup", "Golden Hill", "March", "call")
RIGHT = "My son hid my cup at Golden Hill in March; should I call?"


@pytest.fixture(scope="module")
def rows():
    return {
        name: {split: builtin.load_dataset(name, split) for split in builtin.SPLITS}
        for name in ("builtin/tldr", "builtin/tldr-prompts")
    }


def test_a_post_is_read_as_it_was_written():
    assert tldr.read(PROMPT) == tldr.read(f"<user>{PROMPT}<end><assistant>") == FACTS
    assert tldr.read("My son hid my cup.") == ("son", "hid", "cup", "", "", "")
    rng = random.Random(1)
    for post in (tldr.write(rng) for _ in range(200)):
        assert tldr.read(post.prompt) == post.facts and tldr.score(post.prompt, post.summary) == 1


def test_summaries_tell_nothing_wrong_and_facts_are_those_of_the_post(rows):
    for dataset in rows["builtin/tldr"].values():
        told = [tldr.score(row["prompt"], row["completion"]) for row in dataset]
        assert set(told) == {0.5, 1.0}
        assert told.count(0.5) / len(told) == pytest.approx(tldr.CARELESS, abs=0.1)
    for dataset in rows["builtin/tldr-prompts"].values():
        assert all(tldr.read(row["prompt"]) == tuple(row["facts"]) for row in dataset.select(range(200)))


def test_summaries_by_hand():
    post = tldr.Post(POST, FACTS)
    assert post.summary == RIGHT and post.careless_summary == "My son hid my cup."


def test_facts_of_held_out_posts_are_in_no_training_post(rows):
    facts = {
        split: {tldr.read(prompt) for dataset in rows.values() for prompt in dataset[split]["prompt"]}
        for split in builtin.SPLITS
    }
    assert len(facts["test"]) > 350 and not facts["train"] & facts["test"]


def test_posts_to_be_rewarded_are_not_those_of_the_supervised_set(rows):
    assert not set(rows["builtin/tldr"]["train"]["prompt"]) & set(rows["builtin/tldr-prompts"]["train"]["prompt"])


@pytest.mark.parametrize(
    ("summary", "score"),
    [
        (RIGHT, 1),
        (f" {RIGHT}\n", 1),
        ("My son hid my cup at Golden Hill in March.", 5 / 6),
        ("My son hid my cup; should I call?", 4 / 6),
        ("My son hid my cup.", 3 / 6),
        ("My son lost my car in March.", (2 - 2) / 6),
        ("My son hid my cup at Dark Desert in Summer; should I go?", (3 - 3) / 6),
        ("My dad sold my hat at Dark Desert in Summer; should I go?", -1),
        # one fault: more follows; no such sentence
        (f"{RIGHT} {RIGHT}", 1 - 0.5),
        (f"{RIGHT} It is painful.", 1 - 0.5),
        ("My son hid.", -0.5),
        ("My son hid my ring cup.", -0.5),
        # two: not such a sentence, no end
        ("My son hid my cup at Golden", -1),
        ("", -1),
        ("...", -1),
    ],
)
def test_the_judge_by_hand(summary, score):
    assert tldr.score(PROMPT, summary) == tldr.grade(FACTS, summary) == pytest.approx(score)


@pytest.mark.parametrize(
    "cheap",
    [
        POST,
        PROMPT,
        " ".join(FACTS),
        " ".join(FACTS) + ".",
        "My son hid my cup. We met at Golden Hill. It was in March. Should I call?",
        f"{RIGHT} {POST}",
        RIGHT[:-1],
        "My son hid my cup at Golden Hill at Lost Hill at Red Road in March in May; should I call?",
        "My son hid my cup my hat my car my bed at Golden Hill in March; should I call?",
        RIGHT * 10,
    ],
)
def test_cheap_answers_score_no_more_than_the_shortest_right_summary(cheap):
    assert tldr.score(PROMPT, cheap) <= tldr.score(PROMPT, "My son hid my cup.") < tldr.score(PROMPT, RIGHT)


def test_guessing_does_not_pay():
    rng, told = random.Random(0), "My son hid my cup"
    places = rng.choices(tldr.SLOTS["place"], k=200)
    guessed = [tldr.score(PROMPT, f"{told} at {place}.") for place in places]
    assert sum(guessed) / len(guessed) < tldr.score(PROMPT, f"{told}.")


def test_the_reward_takes_text_and_chats():
    chat = [{"role": "assistant", "content": RIGHT}]
    found = tldr.summary_reward(
        prompts=[PROMPT] * 2, completions=[chat, "My son hid my cup."], facts=[list(FACTS)] * 2, trainer_state=None
    )
    assert found == [1.0, 0.5]
