"""Where in a user's own code an error came from, in a few words."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import shared

OURS = Path(shared.__file__).parent
INSTALLED = [Path(path) for path in set(sysconfig.get_paths().values())]


def place_of(error: BaseException) -> str:
    """`(my_rewards.py, line 7)`: the innermost line of the user's code, or of an installed package; may be empty."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return _shown(error.filename, error.lineno)
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    frames = [frame for frame in frames if not frame[0].startswith("<frozen ") and not _within(frame[0], [OURS])]
    own = [frame for frame in frames if not _within(frame[0], INSTALLED)]
    return _shown(*(own or frames)[-1]) if frames else ""


def _within(path: str, folders: list[Path]) -> bool:
    return any(Path(path).is_relative_to(folder) for folder in folders)


def _shown(path: str, line: int) -> str:
    return f"({Path(path).name}, line {line})"
