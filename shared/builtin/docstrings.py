"""`builtin/docstrings`: real text, the documentation strings of Python's own standard library.

They are read from the source files of the Python that runs, without importing them: its modules that are single files,
without private ones and tests. A module belongs to a split by its name. Another version of Python has other texts.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from shared.builtin.exchanges import split_of, to_dataset
from shared.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

SHORTEST = 60  # characters


def load(split: str) -> Dataset:
    """Rows of `text` (a documentation string, indentation removed) and `module` (where it is from).

    Raises:
        DataError: this Python comes without its source files.
    """
    rows = [(text, module) for text, module in _read(sysconfig.get_path("stdlib")) if split_of(module) == split]
    return to_dataset({"text": [text for text, _ in rows], "module": [module for _, module in rows]})


@cache
def _read(folder: str) -> tuple[tuple[str, str], ...]:
    """Every text and the first module it stands in: one that stands in two would otherwise be in both splits."""
    found: dict[str, str] = {}
    for path in sorted(Path(folder).glob("[a-z]*.py")):
        for text in _documentation(path):
            found.setdefault(text, path.stem)
    if not found:
        raise DataError(
            f"builtin/docstrings reads the sources of the standard library, but {folder} has none; use other data, or "
            "a Python that comes with them."
        )
    return tuple(found.items())


def _documentation(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text and len(text) >= SHORTEST:
                yield text
