"""Prompts from lists, text files, data sets and functions; what is wrong with them is told by row."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset

from diffusionalign.prompts import checked_prompts, prompt_rows
from shared.data.loading import load_datasets
from shared.data.rows import ROW, Rows
from shared.errors import DataError, UserError
from shared.trainers.rollout import in_memory


def options(**given):
    base = {"seed": 3, "on_bad_row": "error", "should_log": True, "eval_strategy": SimpleNamespace(value="no")}
    return SimpleNamespace(**{**base, "max_steps": 10, "eval_strategy": "no", **given})


def first(rows, count):
    return [rows[at] for at in range(count)]


def test_a_list_of_texts_and_one_of_rows_with_more_columns(capsys):
    train, held_out = checked_prompts(["a red circle", "a cat"], [{"prompt": "a dog", "colour": "red"}], options())
    assert first(train, 2) == [{ROW: 0, "prompt": "a red circle"}, {ROW: 1, "prompt": "a cat"}]
    assert first(held_out, 1) == [{ROW: 0, "prompt": "a dog", "colour": "red"}]
    assert capsys.readouterr().out == "train: 2 rows\neval: 1 rows\n"


def test_a_text_file_has_one_prompt_a_line(tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa red circle\n\n  ein grüner Kreis \r\na cat", encoding="utf-8")
    train, _ = checked_prompts(str(path), None, options())
    assert [row["prompt"] for row in first(train, len(train))] == ["a red circle", "ein grüner Kreis", "a cat"]
    assert "data: train: text → prompt" in capsys.readouterr().out
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"empty\.txt: there are no rows in it"):
        checked_prompts(tmp_path / "empty.txt", None, options())
    with pytest.raises(UserError, match="'a red circle': there is no such text file"):
        checked_prompts("a red circle", None, options())


def test_a_text_file_on_the_command_line_can_hold_a_share_out(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(20)))
    for streaming in (False, True):
        data = load_datasets(str(path), streaming=streaming)
        assert next(iter(data.train)) == {"text": "prompt 0"} and data.test is None
    data = load_datasets(str(path), eval_fraction=0.2)
    train, held_out = checked_prompts(data.train, data.test, options())
    assert (len(train), len(held_out)) == (16, 4)
    assert {row["prompt"] for rows in (train, held_out) for row in rows} == {f"prompt {i}" for i in range(20)}


def test_text_files_that_lie_beside_other_data_are_no_data(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("all yours\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a cat"}\n')
    assert load_datasets(str(tmp_path)).train[:] == {"prompt": ["a cat"]}


def test_usual_names_of_the_column_are_known_and_told(capsys):
    for rows in ([{"caption": "a cat", "text": "x"}], Dataset.from_list([{"caption": "a cat", "text": "x"}])):
        train, _ = checked_prompts(rows, None, options())
        assert first(train, 1) == [{ROW: 0, "prompt": "a cat", "text": "x"}]
        assert "data: train: caption → prompt" in capsys.readouterr().out
    stream = IterableDataset.from_generator(lambda: iter([{"text": "a cat"}, {"text": "a dog"}]))
    assert list(checked_prompts(stream, None, options())[0]) == [
        {"prompt": "a cat", ROW: 0},
        {"prompt": "a dog", ROW: 1},
    ]
    with pytest.raises(DataError, match=r"columns title, url: none is known.*dataset_columns"):
        checked_prompts([{"title": "a cat", "url": "x"}], None, options())


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["a cat", " "], "row 1: prompt is empty"),
        (["a cat", 7], "row 1: prompt is a int, expected a text"),
        ([[{"role": "user", "content": "a cat"}]], "row 0: prompt is a list, expected a text"),
        ([{"prompt": "a cat"}, {"other": 1}], "row 1: prompt is missing"),
        (Dataset.from_dict({"prompt": ["a cat", None]}), "row 1: prompt is missing"),
        ([], "train_dataset is empty: it has no prompt"),
        (Dataset.from_dict({"prompt": []}), "The train data is empty"),
        (None, "train_dataset is missing"),
        (7, "train_dataset is a int"),
    ],
)
def test_what_cannot_be_used_is_named(rows, said):
    with pytest.raises(UserError, match=said):
        checked_prompts(rows, None, options())


def test_bad_rows_can_be_left_out(capsys):
    train, held_out = checked_prompts(["", "a cat", None], {"b": ["a dog", ""]}, options(on_bad_row="skip"))
    assert first(train, 1) == [{ROW: 1, "prompt": "a cat"}] and len(train) == 1
    assert isinstance(held_out["b"], Rows) and first(held_out["b"], 1)[0]["prompt"] == "a dog"
    assert "train: 1 of 3 rows; 2 left out:\n  row 0: prompt is empty\n  row 2: prompt is missing" in (
        capsys.readouterr().out
    )
    with pytest.raises(DataError, match="No row is left"):
        checked_prompts(["", " "], None, options(on_bad_row="skip"))


def test_a_function_gives_prompts_and_columns_without_end():
    asked = iter(range(100))

    def ask():
        return f"prompt {next(asked)}", {"number": 1}

    rows, _ = checked_prompts(ask, None, options())
    assert in_memory(rows, 3) == [{ROW: i, "number": 1, "prompt": f"prompt {i}"} for i in range(3)]
    assert in_memory(rows, 5)[:3] == in_memory(rows, 3)
    with pytest.raises(UserError, match="max_steps is missing"):
        checked_prompts(ask, None, options(max_steps=-1))
    with pytest.raises(UserError, match="eval_dataset is a function"):
        checked_prompts(["a"], ask, options())


def test_a_functions_random_prompts_are_the_same_everywhere_and_leave_the_trainings_alone():
    def ask():
        return f"{random.random()} {np.random.rand()} {torch.rand(())}"

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    state = random.getstate(), torch.get_rng_state()
    one = in_memory(prompt_rows(ask, seed=3), 4)
    assert (random.getstate(), torch.get_rng_state().tolist()) == (state[0], state[1].tolist())
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    assert in_memory(prompt_rows(ask, seed=3), 4) == one and len({row["prompt"] for row in one}) == 4
    assert in_memory(prompt_rows(ask, seed=4), 4) != one


@pytest.mark.parametrize("given", [7, "", (7, {}), ("a cat", 7), None])
def test_a_function_that_gives_no_prompt_is_named(given):
    def ask():
        return given

    with pytest.raises(DataError, match="row 0: the function ask gave"):
        checked_prompts(ask, None, options())


def test_a_function_that_needs_arguments_is_refused():
    with pytest.raises(UserError, match="takes 'seed': a function of prompts takes no arguments"):
        checked_prompts(lambda seed: "a cat", None, options())
