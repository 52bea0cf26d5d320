"""Tensors on disk by name: written in segments that are there whole or not at all, mapped when read.

A folder holds any number of segments, and any number of processes and runs add to it at the same time:

    <folder>/<segment>.bin    tensors, bit for bit, one behind the other
             <segment>.json   where each stands

A segment counts once its .json is there, and only with all of its bytes. Nothing is ever deleted or changed here; what
two processes add at once is there twice.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from shared.errors import UserError

SEGMENT_BYTES = 1 << 30  # an interrupted run keeps the segments that it has finished
ALIGNMENT = 64
SPARE_BYTES = 1 << 28  # of the disk, left to others

Layout = list[tuple[str, str, list[int]]]  # name, type and shape of each tensor of an entry


class FeatureStore:
    """Entries `key -> {name: tensor}` in one folder. It can be sent to another process, which opens it anew.

    Args:
        folder: where the segments are; made when something is written.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._maps: dict[str, np.ndarray] = {}
        self._entries: dict[str, tuple[str, int, Layout]] = {}
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry. They lie in the mapped file: what is written into them is lost."""
        segment, offset, layout = self._entries[key]
        found = {}
        for name, dtype, shape in layout:
            size = math.prod(shape) * getattr(torch, dtype).itemsize
            if size:
                raw = torch.from_numpy(self._maps[segment][offset : offset + size])
                found[name] = raw.view(getattr(torch, dtype)).view(shape)
            else:
                found[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            offset += _aligned(size)
        return found

    def refresh(self) -> None:
        """Take in the segments that were finished since."""
        for path in sorted(self.folder.glob("*.json")):
            if path.stem in self._maps:
                continue
            try:
                index = json.loads(path.read_text(encoding="utf-8"))
                values = path.with_suffix(".bin")
                if values.stat().st_size != index["bytes"]:
                    continue
                # copy-on-write: torch warns of arrays that it may not write into
                mapped = np.memmap(values, dtype=np.uint8, mode="c") if index["bytes"] else np.empty(0, np.uint8)
                self._maps[path.stem] = mapped
                for key, (offset, layout) in index["entries"].items():
                    self._entries.setdefault(key, (path.stem, offset, index["layouts"][layout]))
            except (OSError, ValueError, KeyError, TypeError):  # damaged, or another's
                continue

    def writer(self) -> Writer:
        """Adds entries; to be used in a `with` statement. They show after `refresh`."""
        return Writer(self.folder)


class Writer:
    """Writes entries to segments of at most about SEGMENT_BYTES.

    Args:
        folder: of the store.

    Raises:
        UserError: the folder cannot be written to, or its disk is full.
    """

    def __init__(self, folder: Path):
        self.folder, self.written = folder, 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        self._finish()

    def add(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Write one entry."""
        try:
            self._open()
            start, layout = self._at, []
            for name, tensor in tensors.items():
                whole = tensor.detach().cpu().contiguous().flatten()
                raw = whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b""
                self._file.write(raw + bytes(_aligned(len(raw)) - len(raw)))
                self._at += _aligned(len(raw))
                layout.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)))
            number = self._layouts.setdefault(json.dumps(layout), len(self._layouts))
            self._entries[key] = (start, number)
        except OSError as error:
            raise UserError(f"{self.folder}: {error}. Give another --vision_cache_dir.") from error
        self.written += self._at - start
        if self._at >= SEGMENT_BYTES:
            self._finish()

    def check_space(self, wanted: float) -> None:
        """Raise UserError where the disk has not so many bytes left."""
        free = shutil.disk_usage(self.folder).free - SPARE_BYTES
        if wanted > free:
            raise UserError(
                f"cache_vision_features: about {wanted / 1e9:,.1f} GB more are needed in {self.folder}, which has "
                f"{max(free, 0) / 1e9:,.1f} GB left. Give a --vision_cache_dir on a larger disk, or leave the cache "
                "out."
            )

    def _open(self) -> None:
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path = self.folder / f"{uuid.uuid4().hex}.bin"
            self._file = self._path.open("wb")
            self._at, self._entries, self._layouts = 0, {}, {}

    def _finish(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            file.close()
            os.truncate(self._path, self._at)  # an entry that was broken off
            layouts = [json.loads(layout) for layout in self._layouts]
            index = {"bytes": self._at, "layouts": layouts, "entries": self._entries}
            unfinished = self._path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(index), encoding="utf-8")
            unfinished.rename(self._path.with_suffix(".json"))
        except OSError as error:
            for path in (self._path, self._path.with_suffix(".tmp")):
                path.unlink(missing_ok=True)
            raise UserError(f"{self.folder}: {error}. Give another --vision_cache_dir.") from error


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
