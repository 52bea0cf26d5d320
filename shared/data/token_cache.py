"""Tables of tokens on disk: found again by what they were made of, written whole or not at all, mapped when read.

A table is a folder `<cache>/tokens/<key>` of plain .npy files and a JSON file, `<cache>` being `$TRIALIGN_CACHE` or
`~/.cache/trialign`. It can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shared.data.rows import Rows
from shared.data.tokens import Ragged, TokenTable

_META = "table.json"
_BATCH = 10_000  # rows hashed at a time


def table_key(*parts: str) -> str:
    """One name for a table from all that decides what is in it."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]


def data_fingerprint(rows: Rows, columns: Collection[str] | None = None) -> str | None:
    """A hash of the rows' content: a data set's own where it lies in files, otherwise taken over all values.

    Args:
        rows: what is hashed.
        columns: of rows that are no plain table, those that matter; None: all.

    Returns:
        None where a row holds something that no two runs write alike, so that nothing can be found again by it.
    """
    digest = hashlib.sha256()
    dataset = rows.dataset
    if getattr(dataset, "cache_files", None):
        digest.update(dataset._fingerprint.encode())
    elif hasattr(dataset, "with_format") and not _shaped(dataset):
        _hash_table(dataset.with_format("arrow"), digest)
    else:
        try:
            for at in range(len(dataset)):
                row = dataset[at]
                row = row if columns is None else {name: row[name] for name in columns if name in row}
                digest.update(json.dumps(row, default=_plain).encode() + b"\n")
        except (TypeError, ValueError):  # json's own for keys, and rings, that it cannot write
            return None
    if rows.kept is not None:
        digest.update(np.asarray(rows.kept, dtype=np.int64).tobytes())
    return digest.hexdigest()[:40]


def _shaped(dataset: Any) -> bool:
    """Whether a data set's rows are read otherwise than they lie in its table."""
    return dataset.format["type"] is not None or set(dataset.format["columns"]) != set(dataset.column_names)


def _plain(value: Any) -> Any:
    """What stands for a value that JSON has no form for; no part of it may be left out."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, bytes):
        return {"bytes": hashlib.sha256(value).hexdigest()}
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype.hasobject:
            return {"objects": array.tolist(), "shape": array.shape}
        return {"array": hashlib.sha256(array.tobytes()).hexdigest(), "dtype": array.dtype.str, "shape": array.shape}
    raise TypeError(f"a {type(value).__name__} cannot be hashed")


def _hash_table(dataset: Any, digest: Any) -> None:
    """Hash the values of an arrow-formatted data set, however they are cut into chunks."""
    import pyarrow as pa

    for start in range(0, len(dataset), _BATCH):
        table = dataset[start : start + _BATCH].combine_chunks().replace_schema_metadata(None)
        # Taking the rows copies them: a slice would bring bits of its neighbours along.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table.take(np.arange(len(table))).combine_chunks())
        digest.update(sink.getvalue())


def load_table(path: Path) -> tuple[TokenTable, dict[str, Any]] | None:
    """A table with what was noted of it, its arrays mapped; None where there is none, or none that can be read."""
    try:
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
        columns: dict[str, Ragged | np.ndarray] = {}
        for name, ragged in meta["columns"].items():
            values = np.load(path / f"{name}.npy", mmap_mode="r")
            if ragged:
                columns[name] = Ragged.of_lengths(values, np.load(path / f"{name}.lengths.npy"))
            else:
                columns[name] = values
        return TokenTable(columns, np.load(path / "rows.npy")), meta["notes"]
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):  # another's, or damaged
        return None


def save_table(path: Path, table: TokenTable, notes: dict[str, Any]) -> None:
    """Write a table under its name at once: no other process ever sees a part of it. A damaged one is replaced.

    Raises:
        OSError: the folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.parent / f".{path.name[:8]}-{uuid.uuid4().hex}"
    folder.mkdir()  # unlike tempfile's, readable for whom the user's umask lets read
    try:
        for name, column in table.columns.items():
            if isinstance(column, Ragged):
                column = column.compact()
                np.save(folder / f"{name}.lengths.npy", column.lengths)
                np.save(folder / f"{name}.npy", column.values)
            else:
                np.save(folder / f"{name}.npy", column)
        np.save(folder / "rows.npy", table.rows)
        ragged = {name: isinstance(column, Ragged) for name, column in table.columns.items()}
        (folder / _META).write_text(json.dumps({"columns": ragged, "notes": notes}), encoding="utf-8")
        if path.exists() and load_table(path) is None:
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was first: its table is the same
            os.rename(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
