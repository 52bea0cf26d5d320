"""The built-in text data: right answers, nothing in both splits, the same rows every time."""

import collections
import random
import re

import pytest

import shared.builtin as builtin
from shared.builtin import arithmetic, docstrings, graded, reviews, steps
from shared.data.schema import Kind, check_rows, detect_kind
from shared.errors import DataError

KINDS = {
    "builtin/arithmetic": Kind.MESSAGES,
    "builtin/arithmetic-prompts": Kind.PROMPT_ONLY,
    "builtin/reviews": Kind.MESSAGES,
    "builtin/reviews-preference": Kind.PREFERENCE,
    "builtin/reviews-unpaired": Kind.UNPAIRED,
    "builtin/reviews-graded": Kind.PREFERENCE,
    "builtin/tldr": Kind.PROMPT_COMPLETION,
    "builtin/tldr-prompts": Kind.PROMPT_ONLY,
    "builtin/steps": Kind.STEPWISE,
    "builtin/docstrings": Kind.LANGUAGE_MODELING,
}
FILM = "The Silent River"
PROMPT = reviews.PROMPT.format(film=FILM)


@pytest.fixture(scope="module")
def loaded():
    return {name: {split: builtin.load_dataset(name, split) for split in builtin.SPLITS} for name in KINDS}


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_what_the_trainers_take(loaded, name):
    for dataset in loaded[name].values():
        assert detect_kind(dataset.column_names, dataset[0]) is KINDS[name]
        assert check_rows(dataset, KINDS[name]).bad == {}


@pytest.mark.parametrize("name", KINDS)
def test_two_loads_give_the_same_rows(loaded, name):
    again = builtin.load_dataset(name, "test")
    assert again.to_dict() == loaded[name]["test"].to_dict()


def asked(dataset) -> list[str]:
    turns = dataset["messages"] if "messages" in dataset.column_names else dataset["prompt"]
    return [turn if isinstance(turn, str) else turn[0]["content"] for turn in turns]


@pytest.mark.parametrize("name", [name for name in KINDS if name != "builtin/docstrings"])
def test_no_question_is_in_both_splits(loaded, name):
    train, test = (set(asked(loaded[name][split])) for split in builtin.SPLITS)
    assert train and test and not train & test


@pytest.mark.parametrize("name", ["builtin/arithmetic", "builtin/arithmetic-prompts"])
def test_no_pair_of_operands_is_in_both_splits_in_any_phrasing(loaded, name):
    def problems(split):
        for text, kind in zip(asked(loaded[name][split]), loaded[name][split]["kind"], strict=True):
            a, b = map(int, re.findall(r"\d+", text))
            yield kind, *((a, b) if kind == "subtraction" else sorted((a, b)))

    assert not set(problems("train")) & set(problems("test"))


def test_every_solution_is_right(loaded):
    signs = {"plus": "+", "minus": "-", "times": "*"}
    for dataset in loaded["builtin/arithmetic"].values():
        for chat, solution in zip(dataset["messages"], dataset["solution"], strict=True):
            a, sign, b = re.search(r"(\d+) (\S+) (\d+)", chat[0]["content"]).groups()
            assert chat[1] == {"role": "assistant", "content": solution}
            assert solution == str(eval(f"{a} {signs.get(sign, sign)} {b}"))


def test_held_out_arithmetic_has_its_number_of_rows(loaded):
    counted = collections.Counter(loaded["builtin/arithmetic"]["test"]["kind"])
    assert counted == arithmetic.TEST_ROWS
    assert counted == collections.Counter(loaded["builtin/arithmetic-prompts"]["test"]["kind"])


def test_half_of_the_reviews_are_positive_and_each_is_what_it_is_called(loaded):
    for dataset in loaded["builtin/reviews"].values():
        assert collections.Counter(dataset["kind"]) == {kind: len(dataset) // 2 for kind in ("positive", "negative")}
        for (prompt, review), kind in zip(dataset["messages"], dataset["kind"], strict=True):
            assert (reviews.score(prompt["content"], review["content"]) > 0) == (kind == "positive")


def test_chosen_reviews_score_above_rejected_ones_and_are_as_long(loaded):
    for row in loaded["builtin/reviews-preference"]["test"]:
        prompt, chosen, rejected = (row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))
        assert reviews.score(prompt, chosen) > 0 > reviews.score(prompt, rejected)
        assert reviews.faults(prompt, chosen) == reviews.faults(prompt, rejected) == 0
        assert chosen.count(".") == rejected.count(".")


def test_the_chosen_of_graded_reviews_scores_higher_by_what_the_margin_says(loaded):
    for row in loaded["builtin/reviews-graded"]["test"]:
        prompt, chosen, rejected = (row[name][0]["content"] for name in ("prompt", "chosen", "rejected"))
        gap = reviews.score(prompt, chosen) - reviews.score(prompt, rejected)
        assert gap >= graded.GAP and row["margin"] == pytest.approx(graded.SCALE * gap)


def test_graded_reviews_hold_sound_and_broken_ones_of_either_sentiment(loaded):
    rows = loaded["builtin/reviews-graded"]["test"]
    judged = [
        (row["prompt"][0]["content"], row[name][0]["content"]) for row in rows for name in ("chosen", "rejected")
    ]
    broken = sum(reviews.faults(*pair) > 0 for pair in judged) / len(judged)
    assert 0.4 < broken < 0.65
    sound = [reviews.score(*pair) for pair in judged if reviews.faults(*pair) == 0]
    assert 0.5 < sum(score > 0 for score in sound) / len(sound) < 0.8


@pytest.mark.parametrize("way", graded.WAYS, ids=lambda way: way.__name__)
def test_each_way_to_spoil_a_good_review_is_seen_by_the_judge(way):
    rng, good = random.Random(0), f"{FILM} is a superb film. The plot is clever. I recommend it."
    spoilt = [way(good, FILM, rng) for _ in range(50)]
    worse = [reviews.score(PROMPT, review) < reviews.score(PROMPT, good) for review in spoilt if review != good]
    assert len(worse) > 40 and sum(worse) / len(worse) > 0.6


def test_labels_say_whether_a_review_is_positive(loaded):
    rows = loaded["builtin/reviews-unpaired"]["test"]
    assert sum(rows["label"]) == len(rows) / 2
    for row in rows:
        assert (reviews.score(row["prompt"][0]["content"], row["completion"][0]["content"]) > 0) == row["label"]


def test_labels_of_steps_are_right_and_steps_go_on_from_the_last_result(loaded):
    labels = []
    for row in loaded["builtin/steps"]["test"]:
        before = re.search(r"Work out (\d+)", row["prompt"]).group(1)
        operations = re.findall(r"[+-] \d", row["prompt"])
        for step, operation, label in zip(row["completions"], operations, row["labels"], strict=True):
            left, said = step.split(" = ")
            assert left == f"{before} {operation}"
            assert label == (eval(left) == int(said)) and int(said) >= 0
            before = said
            labels.append(label)
    assert 0.6 < sum(labels) / len(labels) < 0.8


def test_a_chain_is_drawn_alike_from_the_same_seed():
    assert steps.work(random.Random(4)) == steps.work(random.Random(4))


def test_docstrings_are_of_disjoint_modules_and_no_text_is_twice(loaded):
    train, test = (loaded["builtin/docstrings"][split] for split in builtin.SPLITS)
    assert not set(train["module"]) & set(test["module"])
    texts = [*train["text"], *test["text"]]
    assert len(texts) == len(set(texts)) and min(map(len, texts)) >= docstrings.SHORTEST


def test_a_python_without_sources_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="reads the sources"):
        docstrings.load("train")


@pytest.mark.parametrize(
    ("review", "score"),
    [
        (f"{FILM} is a superb film. The plot is clever.", (1 + 0.5) / 2),
        (f"{FILM} is a terrible film. I disliked the music.", (-1 - 0.5) / 2),
        # under a negation: -0.5 times the word's value
        (f"{FILM} is a solid film. It is not terrible at all.", (0.5 + 0.5) / 2),
        (f"{FILM} is a boring film. The pace is never brilliant. I cannot recommend it.", (-1 - 0.5 - 0.5) / 3),
        # the second "superb" counts nothing
        (f"{FILM} is a superb film. The plot is superb.", (1 + 0) / 2),
        # one fault: a sentence repeated; another film; too short
        (f"{FILM} is a superb film. I recommend it. I recommend it.", (1 + 1 + 0) / 3 - 0.5),
        ("I recommend it. The plot is superb.", 1 - 0.5),
        (f"{FILM} is a superb film.", 1 - 0.5),
        # two: no form, and no end
        (f"{FILM} is a superb film. The plot is not", (1 + 0) / 2 - 1),
        # three: no form, too short, no end
        ("superb superb " + FILM, -1),
        # the film of another name is no form either
        ("The Golden Road is a superb film. I recommend it.", (0 + 1) / 2 - 1),
        ("", -1),
        ("...", -1),
    ],
)
def test_the_judge_by_hand(review, score):
    assert reviews.score(PROMPT, review) == pytest.approx(score)


def test_the_judge_reads_a_rendered_chat_as_well():
    review = f"{FILM} is a superb film. The plot is clever."
    assert reviews.score(f"<user>{PROMPT}<end><assistant>", review) == reviews.score(PROMPT, review)


@pytest.mark.parametrize(
    "degenerate",
    [
        "superb " * 20,
        "I recommend it. " * 10,
        f"{FILM} is a superb film. " * 4,
        f"{FILM} is a superb superb superb film. I recommend it.",
        f"{FILM} {FILM}.",
        " ".join(f"The {aspect} is superb." for aspect in reviews.ASPECTS),
    ],
)
def test_degenerate_answers_score_below_the_plainest_positive_review(degenerate):
    plainest = f"{FILM} is a solid film. The pace is never dull."
    assert reviews.score(PROMPT, degenerate) < reviews.score(PROMPT, plainest) < 0.5


def test_the_share_of_positive_reviews_is_the_mean_of_a_reward():
    prompt = reviews.PROMPT.format(film="The Silent Harbour")
    good, bad = (reviews.write("The Silent Harbour", each, 2, random.Random(0)) for each in (True, False))
    assert reviews.positive_reward(prompts=[prompt] * 2, completions=[good, bad]) == [1.0, 0.0]
    chats = [[{"role": "assistant", "content": text}] for text in (bad, good)]
    asked = [[{"role": "user", "content": prompt}]] * 2
    assert reviews.positive_reward(prompts=asked, completions=chats) == [0.0, 1.0]
