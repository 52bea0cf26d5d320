"""Decoded frames of videos on disk: made once, found again by the file's state and by what was taken from it.

An entry is one .npz file of plain arrays, written whole or not at all, so that several processes can fill one folder.
Every entry can be deleted at any time; nothing here deletes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache import cache_folder
from shared.data.videos import FrameSampling, Video
from shared.errors import UserError

logger = logging.getLogger(__name__)

_FORMAT = 1  # of an entry, and of what decoding does: entries of another are not found


class FrameCache:
    """Frames that were decoded, chosen and made smaller before.

    Args:
        folder: where they are kept; None: `frames` in `$TRIALIGN_CACHE` or `~/.cache/trialign`.

    Raises:
        UserError: the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = Path(os.path.expanduser(folder)) if folder else cache_folder("frames")
        self._writing = True
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"The folder of decoded frames {self.folder} cannot be made: {error.strerror}.") from error

    def key(self, source: Any, sampling: FrameSampling, decoder: str) -> str | None:
        """The name of an entry: a file's path, size and time, or all of the bytes, and what decides the frames.

        Args:
            source: a path, bytes, or a decoder object, for which None is returned: its content is not known.
            sampling: which frames, and how large.
            decoder: as it was asked for.
        """
        if isinstance(source, bytes):
            state = hashlib.blake2b(source, digest_size=20).hexdigest()
        elif isinstance(source, str):
            found = os.stat(source)
            state = f"{os.path.abspath(source)} {found.st_size} {found.st_mtime_ns}"
        else:
            return None
        parts = (str(_FORMAT), state, repr(sorted(asdict(sampling).items())), decoder)
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=20).hexdigest()

    def load(self, key: str) -> Video | None:
        """The entry of this name; None where there is none, or none that is whole."""
        try:
            # Opened here: numpy leaves open what it cannot read.
            with open(self._path(key), "rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in ("frames", "timestamps", "indices")}
                fps, total = float(stored["fps"]), int(stored["total"])
        # A damaged file may fail anywhere on the way, in the archive, its checksums or the arrays' heads, and with
        # whatever error.
        except Exception:
            return None
        frames = arrays["frames"]
        if frames.ndim != 4 or len({len(array) for array in arrays.values()}) != 1:
            return None
        return Video(**arrays, fps=fps, total=total)

    def save(self, key: str, video: Video) -> None:
        """Keep an entry, in place of a damaged one of its name. A disk that is full is named once, and no error."""
        if not self._writing:
            return
        path = self._path(key)
        part = path.with_name(f".{key[:8]}-{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(exist_ok=True)
            with open(part, "wb") as file:
                np.savez(file, **vars(video))
            os.replace(part, path)
        except OSError as error:
            self._writing = False
            logger.warning("Decoded frames are no longer kept in %s: %s", self.folder, error)
            with contextlib.suppress(OSError):
                part.unlink()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npz"
