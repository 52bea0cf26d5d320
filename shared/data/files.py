"""Data sets that lie in a local file or folder.

JSON, CSV and plain text are read here, row by row, and not by the arrow readers: a content that is a string in one row
and a list of parts in the next, a `completion` of digits and a broken line are trouble for those readers, and a user
must be told the file and the line. Rows that are odd but readable are kept, for `schema.check_rows` to name.

Deliberately not here: which split is for training (loading.py), and anything that needs pickle or code from the data.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.data.columns import media_columns
from shared.data.images import undecoded
from shared.data.videos import VIDEO_SUFFIXES
from shared.errors import DataError, UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
LINES = ".txt"  # of a file by its own name: in a folder of data such files are notes and licences
_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_NAMED = {"file_name": "image", "file_names": "images"}  # of metadata: the columns that they become
_OF_PAIRS = ("chosen", "rejected", "jpg_0", "jpg_1")  # two answers, or two pictures
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_CHUNK = 10_000  # rows held as Python objects at a time
_TRUTH = {"true": True, "1": True, "false": False, "0": False}


def load_local(
    path: str | os.PathLike, *, streaming: bool = False, columns: Mapping[str, str] | None = None
) -> dict[str, Dataset | IterableDataset]:
    """Read a file, a folder of files, a folder of images or videos with metadata, or what `save_to_disk` wrote.

    A folder's files belong to the split that their name or folder says (`train.jsonl`, `test/part1.parquet`,
    `data/train-00000-of-00002.parquet`), else to "train". Where it has `metadata.csv`, `.jsonl` or `.parquet` files,
    those are read, and their `file_name` is the `image`, or the `video` where its ending says so. Relative paths of
    images and videos start from the folder of their file. A text file given by its own name has a column `text`, one
    row a line; empty lines are none.

    Args:
        path: the file or folder; it must exist.
        streaming: read rows when they are asked for instead of all at once.
        columns: name in the data -> what the column will be called, to know paths by. Nothing is renamed here.

    Returns:
        Split name -> rows, images and videos not decoded.

    Raises:
        UserError: a file type that is not read here, or no data in the folder.
        DataError: a file that is broken, with the line where there are lines.
    """
    path = Path(path)
    with _quiet():
        if path.is_file():
            return {"train": _read_files([path], streaming, columns)}
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _load_saved(path, streaming)
        return {split: _read_files(files, streaming, columns) for split, files in _find_files(path).items()}


def align(datasets: Sequence[Dataset]) -> list[Dataset]:
    """Give a column that has different types in different data sets one that holds them all, so that they can join.

    Columns that only some have need no help: joining fills them with None.
    """
    from datasets import Json

    types: dict[str, list[Any]] = {}
    for dataset in datasets:
        for name, feature in dataset.features.items():
            if getattr(feature, "dtype", None) != "null" and feature not in types.setdefault(name, []):
                types[name].append(feature)
    mixed = [name for name, features in types.items() if len(features) > 1]
    aligned = []
    for dataset in datasets:
        features = dataset.features.copy()
        names = [name for name in mixed if name in features]
        if names:
            features.update(dict.fromkeys(names, Json()))
            with _quiet():
                dataset = dataset.map(_columns, batched=True, fn_kwargs={"names": names}, features=features)
        aligned.append(dataset)
    return aligned


def _columns(batch: Any, names: list[str]) -> dict[str, list[Any]]:
    return {name: batch[name] for name in names}


def _load_saved(path: Path, streaming: bool) -> dict[str, Any]:
    from datasets import Dataset, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} looks like a saved data set, but cannot be loaded: {error}") from error
    splits = {"train": saved} if isinstance(saved, Dataset) else dict(saved)
    splits = {name: undecoded(dataset) for name, dataset in splits.items()}
    return {name: dataset.to_iterable_dataset() for name, dataset in splits.items()} if streaming else splits


def _find_files(folder: Path) -> dict[str, list[Path]]:
    files = [
        file
        for file in sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        if file.is_file()
        and file.name not in _NOT_DATA
        and not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)
    ]
    files = [file for file in files if _is_metadata(file)] or files
    found = sorted({file.suffix.lower() for file in files})
    if not found:
        raise UserError(
            f"{folder} holds no data: give a folder with {', '.join(SUFFIXES)} files, with images or videos and a "
            "metadata.csv or metadata.jsonl (file_name and the other columns), or one written by save_to_disk."
        )
    if len(found) > 1:
        raise UserError(f"{folder} holds {' and '.join(found)} files, expected one type. Give one of them.")
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_of(file.relative_to(folder)), []).append(file)
    return splits


def _split_of(path: Path) -> str:
    shard = _SHARD.fullmatch(path.stem)
    if shard:
        return shard[1]
    for part in (path.stem, *reversed(path.parts[:-1])):
        for word in re.split(r"[^a-z0-9]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return "train"


def _is_metadata(path: Path) -> bool:
    return path.stem == "metadata"


def _read_files(paths: Sequence[Path], streaming: bool, columns: Mapping[str, str] | None) -> Any:
    from datasets import Dataset, IterableDataset, concatenate_datasets

    suffix = paths[0].suffix.lower()
    if suffix not in (*SUFFIXES, LINES):
        raise UserError(f"{paths[0]}: files of this type are not read. Supported: {', '.join((*SUFFIXES, LINES))}.")
    if suffix == ".parquet":
        tables = [_read_parquet(path, streaming, columns) for path in paths]
        return concatenate_datasets(tables if streaming else align(tables))
    given = {"paths": [str(path) for path in paths], "columns": dict(columns or {})}
    if streaming:
        return IterableDataset.from_generator(iterate_rows, gen_kwargs=given)
    rows = iterate_rows(**given)
    chunks = []
    while chunk := list(islice(rows, _CHUNK)):
        chunks.append(_as_media(Dataset.from_list(_with_all_columns(chunk), on_mixed_types="use_json"), columns))
    if not chunks:
        raise DataError(f"{', '.join(map(str, paths))}: there are no rows in it.")
    return concatenate_datasets(align(chunks))


def _with_all_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`Dataset.from_list` takes the columns from the first row, so that one gets them all."""
    rows[0] = dict.fromkeys(name for row in rows for name in row) | rows[0]
    return rows


def iterate_rows(paths: Iterable[str], columns: Mapping[str, str] | None = None) -> Iterator[dict[str, Any]]:
    """Give the rows of JSON, CSV and text files, image paths made absolute.

    CSV values stay text (a completion of "7" or "None" is what it says), but for a `label` of true, false, 1 or 0.

    Raises:
        DataError: naming file and line.
    """
    for path in map(Path, paths):
        reader = _READERS.get(path.suffix.lower(), _read_csv)
        try:
            for row in reader(path):
                yield _resolve(row, path, columns)
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8 text: {error}") from error


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_row(line, path, f"line {number}")


def _json_row(text: str, path: Path, place: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} {place} is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(row, dict):
        raise DataError(f"{path} {place} is a {type(row).__name__}, expected an object of columns")
    return row


def _read_json(path: Path) -> Iterator[dict[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if "\n{" in text:  # a .json file with one object a line is common
            yield from _read_jsonl(path)
            return
        raise DataError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error
    if isinstance(rows, dict):
        tables = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        rows = tables[0] if len(tables) == 1 and len(rows) == 1 else [rows]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path} item {number} is a {type(row).__name__}, expected an object of columns")
        yield row


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of more than 131,072 characters
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(
                        f"{path} line {reader.line_num}: expected {len(reader.fieldnames)} values as in the head; "
                        "a value with a comma in it needs quotes"
                    )
                if "label" in row:
                    row["label"] = _TRUTH.get(row["label"].strip().lower(), row["label"])
                yield row
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num} is not CSV: {error}") from error


def _read_lines(path: Path) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8-sig") as file:
        yield from ({"text": line.strip()} for line in file if line.strip())


_READERS = {".jsonl": _read_jsonl, ".json": _read_json, LINES: _read_lines}


def _resolve(row: dict[str, Any], path: Path, columns: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Rename metadata columns, and make the paths of images and videos absolute, in columns and in parts."""
    base = os.path.abspath(path.parent)
    if _is_metadata(path):
        for name, column in _NAMED.items():
            column = column.replace("image", "video") if _are_videos(row.get(name)) else column
            if name in row and column not in row:
                row[column] = row.pop(name)
    media = media_columns(row, columns)
    for name, value in row.items():
        if name in media:
            paths = [_absolute(item, base) for item in (value if isinstance(value, list) else [value])]
            several = isinstance(value, list) or (name.endswith("s") and value is not None)
            row[name] = paths if several else paths[0]
        elif name in _OF_PAIRS and isinstance(value, str) and value.lower().endswith(IMAGE_SUFFIXES):
            found = _absolute(value, base)  # an answer may end like a picture's name
            row[name] = found if os.path.isfile(found) else value
        elif isinstance(value, list):
            for message in value:
                content = message.get("content") if isinstance(message, dict) else None
                for part in content if isinstance(content, list) else ():
                    if isinstance(part, dict) and part.get("type") in ("image", "video"):
                        part |= {key: _absolute(part[key], base) for key in ("image", "video", "path") if key in part}
    return row


def _are_videos(names: Any) -> bool:
    first = names[0] if isinstance(names, list) and names else names
    return isinstance(first, str) and first.lower().endswith(VIDEO_SUFFIXES)


def _absolute(value: Any, base: str) -> Any:
    if isinstance(value, list):  # the frames of a video
        return [_absolute(item, base) for item in value]
    if isinstance(value, dict) and value.get("frames") is not None:
        return value | {"frames": _absolute(value["frames"], base)}
    if isinstance(value, dict) and value.get("bytes") is None:
        return value | {"path": _absolute(value.get("path"), base)}
    if not isinstance(value, str) or "://" in value:
        return value
    # An empty cell is a row without an image.
    return os.path.join(base, value) if value else None


def _read_parquet(path: Path, streaming: bool, columns: Mapping[str, str] | None) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        dataset = load_dataset("parquet", data_files={"train": [str(path)]}, split="train", streaming=streaming)
    except (DatasetsError, ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error.__cause__ or error}") from error
    dataset = undecoded(dataset)
    names = [
        name
        for name in (*media_columns(dataset.features or (), columns), *(_NAMED if _is_metadata(path) else ()))
        if _holds_text((dataset.features or {}).get(name))
    ]
    if names:
        remove = [name for name in names if name in _NAMED]
        dataset = dataset.map(_resolve, fn_kwargs={"path": path, "columns": columns}, remove_columns=remove)
    return dataset if streaming else _as_media(dataset, columns)


def _holds_text(feature: Any) -> bool:
    return getattr(getattr(feature, "feature", feature), "dtype", None) in ("string", "large_string")


def _as_media(dataset: Dataset, columns: Mapping[str, str] | None) -> Dataset:
    """Give columns of paths or bytes the type of images or videos, so that they join with other data sets'."""
    from datasets import Image, List, Video

    for name, shown in media_columns(dataset.features, columns).items():
        kind = Image(decode=False) if shown == "image" else Video(decode=False)
        feature = dataset.features[name]
        several = isinstance(feature, List)
        inner = feature.feature if several else feature
        stored = ("string", "large_string", "binary", "large_binary", *(("null",) if several else ()))
        if getattr(inner, "dtype", None) in stored or (isinstance(inner, dict) and set(inner) == {"bytes", "path"}):
            dataset = dataset.cast_column(name, List(kind) if several else kind)
    return dataset


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars that `datasets` draws even for ten rows."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()
