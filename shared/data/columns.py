"""Other data sets' columns as the suite's own: `question` and `answer`, `texts`, paths of images, options to choose.

What is done to a data set is told in one line. Recognised are names that can mean one thing only, and only where the
columns make no kind of data as they are; all others are mapped by the option `dataset_columns`.

Deliberately not here: what the suite's own columns mean (schema.py).
"""

from __future__ import annotations

import string
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from shared.data.conversation import IMAGE_COLUMNS, VIDEO_COLUMNS
from shared.data.schema import column_names, detect_kind
from shared.errors import DataError, UserError

# Columns of one path, or of a list of paths; read as `image` or `images`.
IMAGE_PATHS = ("input_image_path", "image_path", "image_paths", "img_path", "image_file", "image_files")
_QUESTIONS = ("question", "query", "instruction", "problem")
_ANSWERS = ("answer", "output", "response", "label")
_CHOICES = ("options", "choices")
_BESIDE = ("context", "input", *_CHOICES)  # said after the question, in this order


def media_columns(names: Iterable[str], columns: Mapping[str, str] | None = None) -> dict[str, str]:
    """The columns that hold images or videos, or paths of them: name -> `image` or `video`.

    Args:
        names: the columns of the data.
        columns: name in the data -> name here, for those that will be renamed.
    """
    called = {name: (columns or {}).get(name, name) for name in names}
    found = {name: "image" for name, own in called.items() if own in IMAGE_COLUMNS}
    if not found:
        found = dict.fromkeys(_image_paths(called), "image")
    return found | {name: "video" for name, own in called.items() if own in VIDEO_COLUMNS}


def adapt(dataset: Any, columns: Mapping[str, str] | None = None) -> tuple[Any, str | None]:
    """A data set with columns of the suite, and what was done to it in words; None where nothing was.

    What a row lacks is None in it, for `schema.check_rows` to name.

    Args:
        dataset: a datasets.Dataset or IterableDataset, its images not decoded.
        columns: name in the data -> name here; where the data set has one of them, nothing else is made of it. A name
            such as `prompt.text` is that of a field in a column.

    Raises:
        UserError: two of its columns are to have one name.
    """
    dataset = _taken_out(dataset, columns or {})
    names = column_names(dataset)
    given = {name: own for name, own in (columns or {}).items() if name in names}
    twice = [own for at, own in enumerate(given.values()) if own in list(given.values())[:at]]
    if twice:
        both = " and ".join(name for name, own in given.items() if own == twice[0])
        raise UserError(f"dataset_columns calls {both} all {twice[0]}: give each a name of its own.")
    first = next(iter(dataset), None)
    if first is None:
        return dataset, None
    renamed = given or {name: "images" if isinstance(first[name], list) else "image" for name in _image_paths(names)}
    if renamed:
        taken = [own for own in renamed.values() if own in names and own not in renamed]
        dataset = dataset.remove_columns(taken) if taken else dataset
        dataset = dataset.rename_columns(renamed)
    done = [f"{name} → {own}" for name, own in renamed.items()]
    if not given:
        dataset, more = _texts_adapted(dataset, {renamed.get(name, name): value for name, value in first.items()})
        done += more
    return dataset, "; ".join(done) or None


def check_given(columns: Mapping[str, str] | None, found: set[str]) -> None:
    """Raise UserError where `dataset_columns` names what is in no data set.

    Args:
        columns: the option.
        found: the columns of all data sets.
    """
    missing = sorted(name for name in columns or () if name not in found and name.partition(".")[0] not in found)
    if missing:
        raise UserError(
            f"dataset_columns names {', '.join(missing)}, but the data has the columns {', '.join(sorted(found))}. "
            'Write it as {"column in the data": "column here"}.'
        )


def _taken_out(dataset: Any, columns: Mapping[str, str]) -> Any:
    """The data set with fields that are named `column.field` as columns of these names, in the place of their own."""
    from datasets import Dataset

    names = column_names(dataset)
    fields = {
        name: (top, field)
        for name in columns
        for top, dot, field in [name.partition(".")]
        if dot and name not in names and top in names
    }
    if not fields:
        return dataset
    tops = sorted({top for top, _ in fields.values()})
    first = next(iter(dataset.select_columns(tops)), {})
    for name, (top, field) in fields.items():
        if not isinstance(held := first.get(top), Mapping) or field not in held:
            there = f"has the fields {', '.join(held)}" if isinstance(held, Mapping) else "has no fields"
            raise UserError(f"dataset_columns names {name}, but the column {top} {there}.")

    def taken(row: Mapping[str, Any]) -> dict[str, Any]:
        return {name: (row[top] or {}).get(field) for name, (top, field) in fields.items()}

    if not isinstance(dataset, Dataset):
        return dataset.map(taken, remove_columns=tops)
    rows = [taken(row) for row in dataset.select_columns(tops)]
    rest = dataset.remove_columns(tops)
    for name in fields:
        rest = rest.add_column(name, [row[name] for row in rows])
    return rest


def _image_paths(names: Collection[str]) -> list[str]:
    """The column of image paths of data that has no column of images, in a list of one or none."""
    return [] if {*IMAGE_COLUMNS} & set(names) else [name for name in IMAGE_PATHS if name in names][:1]


def _texts_adapted(dataset: Any, first: Mapping[str, Any]) -> tuple[Any, list[str]]:
    names = column_names(dataset)
    question = next((name for name in _QUESTIONS if name in names), None)
    answer = next((name for name in _ANSWERS if name in names), None)
    if {"chosen", "rejected"} <= set(names):
        if question and "prompt" not in names and _is_answer(first["chosen"]):
            return dataset.rename_column(question, "prompt"), [f"{question} → prompt"]
        return dataset, []
    if _is_known(names, first):
        return dataset, []
    if _is_turns(first.get("texts")):
        return _with_texts(dataset, _turns, {}, remove=["texts"]), ["texts → messages"]
    beside = [name for name in _BESIDE if name in names]
    if not (question and answer and _is_clear(first, question, answer, beside)):
        return dataset, []
    made = _with_texts(dataset, _asked, {"question": question, "answer": answer, "beside": beside}, remove=[])
    return made, [f"{' + '.join([question, *beside])} → prompt", f"{answer} → completion"]


def _is_known(names: list[str], first: Mapping[str, Any]) -> bool:
    try:
        detect_kind(names, first)
    except DataError:
        return False
    return True


def _is_answer(value: Any) -> bool:
    """Whether a `chosen` holds the answer alone, not the question as well."""
    return isinstance(value, str) or bool(
        isinstance(value, list) and value and isinstance(value[0], Mapping) and value[0].get("role") == "assistant"
    )


def _is_clear(first: Mapping[str, Any], question: str, answer: str, beside: list[str]) -> bool:
    """Whether the values of the first row are a question, its answer and what is said beside it.

    No chats, no passages in parts, and no `label` that is the number of a class or marks an answer as good or bad.
    """
    said = first[answer]
    answers = said if isinstance(said, list) else [said]
    spoken = str if answer == "label" else (str, int, float)
    return (
        isinstance(first[question], (str, type(None)))
        and all(isinstance(each, (spoken, type(None))) for each in answers)
        and all(_choices(first[name]) is not None for name in beside if name in _CHOICES)
        and all(isinstance(first[name], (str, type(None))) for name in beside if name not in _CHOICES)
    )


def _choices(value: Any) -> dict[str, str] | str | None:
    """What there is to choose from by letter, or the text that says so; None where it is neither."""
    if isinstance(value, Mapping):
        if set(value) == {"text", "label"}:
            value = dict(zip(value["label"], value["text"], strict=False))
        given = {str(name): text for name, text in value.items() if text is not None}
    elif isinstance(value, list):
        given = dict(zip(string.ascii_uppercase, value, strict=False))
    else:
        return value or "" if isinstance(value, (str, type(None))) else None
    return None if any(isinstance(text, (list, Mapping)) for text in given.values()) else given


def _is_turns(texts: Any) -> bool:
    return isinstance(texts, list) and bool(texts) and all(
        isinstance(turn, Mapping) and isinstance(turn.get("user"), str) and isinstance(turn.get("assistant"), str)
        for turn in texts
    )  # fmt: skip


def _with_texts(dataset: Any, function: Any, options: dict[str, Any], remove: list[str]) -> Any:
    """The data set with the columns that `function` makes of a row; stored images are not copied."""
    from datasets import Dataset, Features, List, Value, concatenate_datasets

    if not isinstance(dataset, Dataset):
        return dataset.map(function, fn_kwargs=options, remove_columns=remove)
    read = ["texts"] if function is _turns else [options["question"], options["answer"], *options["beside"]]
    texts = dataset.select_columns(read)
    rows = [function(row, **options) for row in texts]
    message = {"role": Value("string"), "content": Value("string")}
    types = {"prompt": Value("string"), "completion": Value("string"), "messages": List(message)}
    features = Features({name: types[name] for name in rows[0]})
    made = Dataset.from_list(rows, features=features)
    rest = dataset.remove_columns([name for name in (*remove, *made.column_names) if name in dataset.column_names])
    return concatenate_datasets([rest, made], axis=1) if rest.column_names else made


def _turns(row: Mapping[str, Any]) -> dict[str, Any]:
    """The pairs of question and answer in `texts`, one after the other, as one chat."""
    if not _is_turns(row["texts"]):
        return {"messages": None}
    said = ((role, turn[role]) for turn in row["texts"] for role in ("user", "assistant"))
    return {"messages": [{"role": role, "content": text} for role, text in said]}


def _asked(row: Mapping[str, Any], question: str, answer: str, beside: list[str]) -> dict[str, str | None]:
    """Prompt and completion of a question; options that its context lists already are not listed again."""
    prompt = row[question] if isinstance(row[question], str) else None
    said = row[answer]
    letters: list[str] = []
    for name in beside:
        value = _choices(row[name]) if name in _CHOICES else row[name]
        if isinstance(value, dict):
            letters = list(value)
            value = "\n".join(f"{letter}. {choice}" for letter, choice in value.items())
        if prompt is not None and value and not (name in _CHOICES and value in prompt):
            prompt += f"\n{value}"
    if isinstance(said, list) and said:
        said = said[0]  # several wordings of one answer
    if isinstance(said, int) and not isinstance(said, bool) and 0 <= said < len(letters):
        said = letters[said]
    return {"prompt": prompt, "completion": None if isinstance(said, (list, Mapping, type(None))) else str(said)}
