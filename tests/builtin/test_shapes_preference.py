"""Pairs of answers about pictures: the chosen one is right, the other is wrong, and the judges tell which is which."""

import random
from collections import Counter

import pytest

import shared.builtin as builtin
from shared.builtin import shapes, shapes_preference
from shared.builtin.shapes_preference import grade, hallucinates, named, recall, shapes_reward

NAME = "builtin/shapes-preference"
THERE = ["circle red", "square blue"]
LOOK = "<user><image>Describe the image.<end><assistant>"


@pytest.fixture(scope="module")
def rows():
    return {split: builtin.load_dataset(NAME, split) for split in builtin.SPLITS}


def text(turns) -> str:
    return turns[-1]["content"][-1]["text"]


def judged(row, column: str, judge) -> float:
    return judge(text(row["prompt"]), text(row[column]), row["shapes"])


def test_columns(rows):
    for split, dataset in rows.items():
        assert set(dataset.column_names) == {"images", "prompt", "chosen", "rejected", "shapes", "kind"}
        assert Counter(dataset["kind"]) == shapes_preference.ROWS[split]
        row = dataset[0]
        assert [image.size for image in row["images"]] == [(48, 48)]
        assert [turn["role"] for name in ("prompt", "chosen", "rejected") for turn in row[name]] == [
            "user",
            "assistant",
            "assistant",
        ]
        assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]


def test_no_picture_is_in_both_splits_nor_held_out_elsewhere(rows):
    def pictures(dataset) -> set[bytes]:
        return {images[0]["bytes"] for images in dataset.data.column("images").to_pylist()}

    asked = {split: pictures(builtin.load_dataset("builtin/shapes", split)) for split in builtin.SPLITS}
    train, test = pictures(rows["train"]), pictures(rows["test"])
    assert len(train) > 3000 and len(test) > 250
    assert not train & (test | asked["test"]) and not test & asked["train"]


def test_the_chosen_answer_is_right_and_the_rejected_one_is_not(rows):
    for dataset in rows.values():
        dataset = dataset.remove_columns("images").select(range(min(1000, len(dataset))))
        assert all(judged(row, "chosen", grade) == judged(row, "chosen", recall) == 1 for row in dataset)
        assert not any(judged(row, "chosen", hallucinates) for row in dataset)
        assert all(judged(row, "rejected", grade) < 1 for row in dataset)
        told = [judged(row, "rejected", hallucinates) for row in dataset]
        assert 0.85 < sum(told) / len(told) < 0.97  # the others leave a shape out
        for row, wrong in zip(dataset, told, strict=True):
            assert wrong or judged(row, "rejected", recall) < 1


def test_two_loads_give_the_same_rows():
    first, again, other = (shapes_preference.load("test", seed) for seed in (0, 0, 1))
    assert first.to_dict() == again.to_dict() != other.to_dict()


@pytest.mark.parametrize("way", shapes_preference.WAYS, ids=lambda way: way.__name__)
def test_each_way_makes_a_right_description_wrong(way):
    rng, made = random.Random(0), 0
    for _ in range(300):
        right = [(shape.form, shape.colour) for shape in shapes.draw_layout(rng)]
        wrong = way(list(right), rng)
        if wrong is None:
            continue
        made += 1
        there = [f"{form} {colour}" for form, colour in right]
        assert grade(LOOK, shapes_preference.describe(wrong), there) < 1
        assert len(wrong) - len(right) == {"add": 1, "leave_out": -1}.get(way.__name__, 0)
        assert hallucinates(LOOK, shapes_preference.describe(wrong), there) == (way.__name__ != "leave_out")
    assert made > 100


def test_shapes_are_laid_in_their_order():
    told = [("square", "red"), ("circle", "blue"), ("triangle", "red")]
    for seed in range(20):
        layout = shapes.lay(told, random.Random(seed))
        assert [(shape.form, shape.colour) for shape in layout] == told and layout == tuple(sorted(layout))
        assert len({shape.cell for shape in layout}) == 3


def test_bad_habits_hang_on_the_picture():
    rng = random.Random(0)
    circle, triangle = ("circle", "red"), ("triangle", "white")
    several = [shapes_preference.embellish([("square", "blue"), circle], rng) for _ in range(400)]
    added = [told for told in several if len(told) == 3]
    assert len(added) / 400 == pytest.approx(shapes_preference.HABIT, abs=0.06)
    assert {told[2][0] for told in added} == {"triangle"} and {told[2][1] for told in added} == set(shapes.COLOURS)
    assert shapes_preference.embellish([circle, ("square", "blue")], rng) == [circle, ("square", "blue")]
    told = Counter(tuple(shapes_preference.embellish([triangle], rng)) for _ in range(400))
    assert set(told) == {(triangle,), (("triangle", "yellow"),)}


@pytest.mark.parametrize(
    ("prompt", "answer", "says"),
    [
        (LOOK, "circle red square blue", ["circle red", "square blue"]),
        (LOOK, "Red circle, blue square.", ["circle red", "square blue"]),
        (LOOK, "circle square blue", ["circle", "square blue"]),
        (LOOK, "a green thing", ["green"]),
        (LOOK, "", []),
        ("What colour is the circle?", "red", ["circle red"]),
        ("What colour is the circle?", "circle red", ["circle red"]),
        ("What shape is red?", "circle", ["circle red"]),
        ("What shape is red?", "blue", ["blue"]),
    ],
)
def test_what_an_answer_names_by_hand(prompt, answer, says):
    assert named(prompt, answer) == says


@pytest.mark.parametrize(
    ("answer", "wrong", "told", "worth"),
    [
        ("circle red square blue", 0, 1, 1),
        ("square blue circle red", 0, 1, 1),
        ("circle red", 0, 0.5, 0.5),
        ("", 0, 0, 0),
        ("circle", 0, 0, 0),  # there is one, but that is not all of it
        ("circle red square green", 1, 0.5, (1 - 1) / 2),
        ("circle blue square red", 1, 0, (0 - 2) / 2),
        ("circle red square blue triangle white", 1, 1, (2 - 1) / 2),
        ("circle red circle red square blue", 1, 1, (2 - 1) / 2),  # there is only one
        ("circle red square blue white", 1, 1, (2 - 1) / 2),
        ("circle red square blue top left", 0, 1, (2 - 2) / 2),
        ("circle red square green triangle white triangle blue", 1, 0.5, -1),
    ],
)
def test_the_judges_of_a_description_by_hand(answer, wrong, told, worth):
    assert hallucinates(LOOK, answer, THERE) == wrong
    assert recall(LOOK, answer, THERE) == told
    assert grade(LOOK, answer, THERE) == worth


@pytest.mark.parametrize(
    ("prompt", "answer", "wrong", "worth"),
    [
        ("What colour is the circle?", "red", 0, 1),
        ("What colour is the circle?", "blue", 1, -1),
        ("What colour is the circle?", "circle", 0, 0),
        ("What shape is blue?", "square", 0, 1),
        ("What shape is blue?", "circle", 1, -1),
        ("What shape is blue?", "square circle", 1, 0),
    ],
)
def test_the_judges_of_an_answer_by_hand(prompt, answer, wrong, worth):
    assert hallucinates(prompt, answer, THERE) == wrong and grade(prompt, answer, THERE) == worth


def test_the_judges_say_what_their_figures_are_called():
    assert (hallucinates.figure, hallucinates.lower_is_better) == ("hallucination_rate", True)
    assert recall.figure == "recall"


def test_naming_all_that_there_may_be_does_not_pay():
    everything = shapes_preference.describe((form, colour) for form in shapes.FORMS for colour in shapes.COLOURS)
    assert recall(LOOK, everything, THERE) == 1 and grade(LOOK, everything, THERE) == -1


def test_the_reward_takes_text_and_chats(rows):
    row = rows["test"][0]
    found = shapes_reward(
        prompts=[row["prompt"], LOOK, [{"role": "user", "content": "Describe the image."}]],
        completions=[row["chosen"], "circle red", [{"role": "assistant", "content": "square green"}]],
        shapes=[row["shapes"], THERE, THERE],
        trainer_state=None,
    )
    assert found == [1.0, 0.5, -0.5]
