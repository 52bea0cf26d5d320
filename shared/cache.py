"""Where results are kept between runs: `$TRIALIGN_CACHE` or `~/.cache/trialign`, which can be deleted at any time."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folder(what: str = "tokens") -> Path:
    """The folder that holds one kind of cached results."""
    given = os.environ.get("TRIALIGN_CACHE")
    if given:
        return Path(os.path.expanduser(given)) / what
    home = os.path.expanduser("~")
    if home == "~":  # a user without a name and a home, as in some containers
        return Path(tempfile.gettempdir()) / f"trialign-{os.getuid()}" / what
    return Path(home) / ".cache" / "trialign" / what


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Make the other processes of this machine wait while one of them makes what is to be at `path`.

    Raises:
        OSError: the folder cannot be written to.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):
        yield
