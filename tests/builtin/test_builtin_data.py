"""The built-in picture data: one right answer to every question, no picture in both splits, the same bytes."""

import collections
import hashlib
import importlib
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import shared.builtin as builtin
from shared.builtin import digits, shapes
from shared.errors import UserError

NAMES = ["builtin/digits", "builtin/shapes", "builtin/shapes-simple"]


@pytest.fixture(scope="module", params=NAMES)
def both_splits(request):
    return {split: builtin.load_dataset(request.param, split) for split in builtin.SPLITS}


def encoded(dataset) -> list[bytes]:
    """The stored bytes of each row's only picture."""
    chunks = dataset.data.column("images").to_pylist()
    assert all(len(images) == 1 for images in chunks)
    return [images[0]["bytes"] for images in chunks]


def test_importing_the_registry_stays_light():
    code = "import sys, shared.builtin; print([m for m in ('torch', 'datasets', 'transformers') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_rows_have_the_promised_form(both_splits):
    for dataset in both_splits.values():
        assert set(dataset.column_names) == {"images", "messages", "kind"}
        row = dataset[0]
        assert [image.size for image in row["images"]] == [(48, 48)]
        user, assistant = row["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert [part["type"] for part in user["content"]] == ["image", "text"]
        assert [part["type"] for part in assistant["content"]] == ["text"]
        assert assistant["content"][0]["text"]


def test_no_picture_is_in_both_splits(both_splits):
    train, test = (set(encoded(both_splits[split])) for split in builtin.SPLITS)
    assert not train & test


def test_rows_of_prompts_ask_where_and_how_many_and_hold_the_answer():
    rows = builtin.load_dataset("builtin/shapes-prompts", "test")
    assert set(rows.column_names) == {"images", "prompt", "solution", "kind"}
    assert collections.Counter(rows["kind"]) == shapes.PROMPT_ROWS["test"]
    allowed = {"where": shapes.PLACES, "count": shapes.COUNTS}
    for row in rows:
        (turn,) = row["prompt"]
        assert turn["role"] == "user" and [part["type"] for part in turn["content"]] == ["image", "text"]
        assert turn["content"][1]["text"].startswith("Where" if row["kind"] == "where" else "How many")
        assert row["solution"] in allowed[row["kind"]] and [image.size for image in row["images"]] == [(48, 48)]


def test_no_picture_of_the_prompts_is_held_out_elsewhere():
    prompts, asked = (
        {split: set(encoded(builtin.load_dataset(name, split))) for split in builtin.SPLITS}
        for name in ("builtin/shapes-prompts", "builtin/shapes")
    )
    assert len(prompts["train"]) > 3000
    assert not prompts["train"] & (prompts["test"] | asked["test"]) and not prompts["test"] & asked["train"]


def test_two_loads_give_the_same_bytes():
    def digest(dataset) -> str:
        return hashlib.sha256(b"".join(encoded(dataset)) + repr(dataset["messages"][:]).encode()).hexdigest()

    assert digest(shapes.load("test")) == digest(shapes.load("test"))
    assert digest(shapes.load("test", seed=1)) != digest(shapes.load("test", seed=0))
    assert shapes.load_prompts("test").to_dict() == shapes.load_prompts("test").to_dict()
    assert digest(digits.load("test")) == digest(digits.load("test"))


def test_every_kind_has_its_number_of_rows():
    counted = collections.Counter(builtin.load_dataset("builtin/shapes", "test")["kind"])
    assert counted == shapes.TEST_ROWS
    for split, rows in shapes.SIMPLE_ROWS.items():
        assert collections.Counter(builtin.load_dataset("builtin/shapes-simple", split)["kind"]) == rows


def test_simple_pictures_have_one_or_two_shapes():
    rows = builtin.load_dataset("builtin/shapes-simple", "test").remove_columns("images")
    told = [row["messages"][1]["content"][0]["text"].split() for row in rows if row["kind"] == "describe"]
    assert {len(words) // 2 for words in told} == {1, 2}


def test_split_does_not_depend_on_the_pixels():
    layout = (shapes.Shape(0, "circle", "red"), shapes.Shape(4, "square", "blue"))
    pictures = {shapes.paint(layout, random.Random(seed)).tobytes() for seed in range(20)}
    assert len(pictures) > 10
    assert shapes.split_of(layout) == shapes.split_of(tuple(layout))


def test_about_one_layout_in_eight_is_held_out():
    rng = random.Random(0)
    layouts = [shapes.draw_layout(rng) for _ in range(4000)]
    share = np.mean([shapes.split_of(layout) == "test" for layout in layouts])
    assert 0.105 < share < 0.145


def right_answers(question: str, layout: shapes.Layout) -> set[str]:
    """Work out from a layout, in another way than the code, all answers that are right."""
    words = question.rstrip("?.").split()
    if question.startswith("What colour"):
        return {s.colour for s in layout if s.form == words[-1]}
    if question.startswith("What shape"):
        return {s.form for s in layout if s.colour == words[-1]}
    if question.startswith("Where"):
        return {shapes.PLACES[s.cell] for s in layout if s.form == words[-1]}
    if question.startswith("How many shapes"):
        return {str(len(layout))}
    if question.startswith("How many"):
        return {str(sum(s.colour == words[2] for s in layout))}
    return {" ".join(f"{s.form} {s.colour}" for s in sorted(layout))}


def test_every_question_has_exactly_one_right_answer():
    rng = random.Random(3)
    asked = collections.Counter()
    for _ in range(3000):
        layout, kind = shapes.draw_layout(rng), rng.choice(list(shapes.TRAIN_ROWS))
        pair = shapes.ask(kind, layout, rng)
        if pair is not None:
            assert right_answers(pair[0], layout) == {pair[1]}
            asked[kind] += 1
    assert set(asked) == set(shapes.TRAIN_ROWS)


def test_shape_is_not_asked_for_a_colour_that_two_shapes_have():
    layout = (shapes.Shape(0, "circle", "red"), shapes.Shape(4, "square", "red"))
    assert all(shapes.ask("shape", layout, random.Random(seed)) is None for seed in range(5))


def test_a_shape_is_painted_in_its_cell_in_its_colour():
    picture = shapes.paint((shapes.Shape(5, "square", "red"),), random.Random(0))  # middle row, right column
    ys, xs = np.nonzero(picture.any(axis=-1))
    assert ys.min() >= 16 and ys.max() < 32 and xs.min() >= 32 and xs.max() < 48
    assert tuple(picture[24, 40]) == shapes.COLOURS["red"]
    assert len(ys) == (np.ptp(ys) + 1) ** 2  # filled


def test_the_three_forms_differ_in_area():
    area = {form: (shapes.sprite(form, "white", 14)[..., 0] > 128).sum() / 14**2 for form in shapes.FORMS}
    assert area["square"] == 1
    assert area["circle"] == pytest.approx(np.pi / 4, abs=0.04)
    assert area["triangle"] == pytest.approx(0.5, abs=0.04)


def test_digits_are_the_1797_of_the_source():
    pixels, labels = zip(*(digits.read(split) for split in builtin.SPLITS), strict=True)
    assert [len(p) for p in pixels] == [1437, 360]
    counted = collections.Counter(labels[0] + labels[1])
    assert [counted[d] for d in range(10)] == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert max(p.max() for p in pixels) == 16
    assert min(collections.Counter(labels[1]).values()) >= 20  # every digit is in the held-out set


def test_an_enlarged_digit_keeps_its_brightness():
    flat = np.full((8, 8), 8, np.uint8)
    assert (digits.enlarge(flat) == 127).all()
    assert digits.enlarge(flat).shape == (48, 48, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: builtin.load_dataset("builtin/shape"), "Did you mean 'builtin/shapes'"),
        (lambda: builtin.load_dataset("builtin/digits", "validation"), "train, test"),
        (lambda: builtin.model_path("builtin/vlm_small"), "Did you mean 'builtin/vlm-small'"),
    ],
)
def test_a_wrong_name_is_explained(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_misspelt_builtin_name_is_still_taken_for_one():
    assert builtin.is_builtin("builtin/shape")
    assert not builtin.is_builtin("HuggingFaceTB/SmolVLM-Instruct")


def test_the_files_in_the_repository_are_small():
    root = Path(builtin.__file__).parent
    files = [path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert max(path.stat().st_size for path in files) < 4_000_000
    assert (root / "data" / "DIGITS_LICENSE.txt").read_text().count("CC BY 4.0") == 1


def test_a_recipe_is_left_out_for_models_that_are_not_built_in():
    recipe = builtin.recipe("sft_vlm")
    assert recipe({}) == builtin.RECIPES / "sft_vlm.yaml"
    assert recipe({"model_name_or_path": "builtin/vlm-small"}) == recipe({})
    assert recipe({"model_name_or_path": "someone/else"}) is None


TRAINED = [path.stem for path in sorted(builtin.RECIPES.glob("*.yaml")) if "builtin/" in path.read_text()]


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipe_names_what_is_there_and_answers_every_held_out_row(name):
    options = yaml.safe_load((builtin.RECIPES / f"{name}.yaml").read_text())
    names = options["dataset_name"] if isinstance(options["dataset_name"], list) else [options["dataset_name"]]
    assert options["model_name_or_path"] in {**builtin.MODELS, **builtin.PIPELINES}
    assert set(names) <= set(builtin.DATASETS)
    if "eval_answers" in options:
        assert options["eval_answers"] == sum(len(builtin.load_dataset(name, "test")) for name in names)
    judges = options.get("judge", [])
    for judge in [judges] if isinstance(judges, str) else judges:
        module, _, function = judge.rpartition(".")
        assert callable(getattr(importlib.import_module(module), function))
