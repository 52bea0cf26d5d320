"""Latents of a run's pictures: encoded once, before training, and kept on disk for later runs.

They are kept under a key of the VAE's weights, the size and type, and the pictures themselves:

    $TRIALIGN_CACHE/latents/<key>/latents.npy   (rows, 2, C, h, w), half types as whole numbers of as many bits
                                  sizes.npy     (rows, 2, 4), zeros for a row that cannot be used
                                  made_of.json  what the key stands for, to be read by people

Processes on several machines need a cache folder that all of them see. Nothing is ever deleted here.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from diffusionalign.pipelines.base import PipelineAdapter
from diffusionalign.preference_batches import LATENTS, SIZES, PicturePairCollator
from diffusionalign.preference_rows import PICTURES, PairRows
from shared.cache import cache_folder
from shared.data.rows import ROW, Extended
from shared.errors import UserError
from shared.runtime.launch import on_first_process

FORMAT = 1  # raised when the same pictures come to give other latents


class Kept(Sequence):
    """Rows of an array on disk as tensors.

    Args:
        path: of a `.npy` file.
        dtype: of the tensors, where the array holds their bits.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None = None):
        self.array, self.dtype = np.load(path, mmap_mode="r"), dtype

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Tensor:
        values = torch.from_numpy(np.array(self.array[index]))
        return values if self.dtype is None else values.view(self.dtype)


def with_latents(
    rows: Any,
    collator: PicturePairCollator,
    adapter: PipelineAdapter,
    *,
    accelerator: Accelerator,
    batch_size: int,
    what: str,
) -> Extended:
    """The rows with the latents of their pictures, computed or from the cache. All processes call it together.

    Args:
        rows: of PairRows.
        collator: makes the pixels.
        adapter: of the pipeline whose VAE encodes them; what it gives is kept in the adapter's type.
        accelerator: of the trainer.
        batch_size: rows a process encodes at a time.
        what: the rows' name in the line that is printed.

    Raises:
        UserError: rows that are streamed. DataError: a picture that cannot be read, unless such rows are left out.
    """
    if not isinstance(rows, PairRows):
        raise UserError(
            "precompute_latents encodes all pictures beforehand, which streamed rows do not allow. Leave the option "
            "or the streaming out."
        )
    dtype = adapter.dtype
    made_of = {"format": FORMAT, "size": list(collator.size), "type": str(dtype), "vae": _digest_of_vae(adapter)}
    made_of["pictures"] = on_first_process(lambda: _digest_of_pictures(rows))
    key = hashlib.blake2b(json.dumps(made_of).encode(), digest_size=16).hexdigest()
    folder = cache_folder("latents") / broadcast_object_list([key])[0]
    started = time.perf_counter()
    known = broadcast_object_list([folder.is_dir()])[0]
    if not known:
        _encode(rows, collator, adapter, accelerator, batch_size, folder, made_of)
    if accelerator.is_main_process:
        seconds = time.perf_counter() - started
        how = "from cache:" if known else f"in {seconds:.1f} s ({len(rows) / seconds:,.0f} rows/s), kept in"
        print(f"Latents of {what}: {len(rows):,} rows {how} {folder}", flush=True)
    held = None if dtype == torch.float32 else dtype
    return Extended(rows, {LATENTS: Kept(folder / "latents.npy", held), SIZES: Kept(folder / "sizes.npy")})


def _encode(
    rows: PairRows,
    collator: PicturePairCollator,
    adapter: PipelineAdapter,
    accelerator: Accelerator,
    batch_size: int,
    folder: Path,
    made_of: dict[str, Any],
) -> None:
    """Write a folder so that it is there whole or not at all; every process encodes its share of the rows."""
    unfinished = Path(broadcast_object_list([str(folder.with_name(f".{folder.name}.{os.getpid()}"))])[0])
    half = adapter.dtype != torch.float32
    shape = adapter.latent_shape(*collator.size)
    whole = {
        "latents": ((len(rows), 2, *shape), np.int16 if half else np.float32),
        "sizes": ((len(rows), 2, 4), "<i8"),
    }
    if accelerator.is_main_process:
        unfinished.mkdir(parents=True, exist_ok=True)
        for name, (size, kind) in whole.items():
            np.lib.format.open_memmap(unfinished / f"{name}.npy", "w+", kind, size).flush()
        (unfinished / "made_of.json").write_text(json.dumps(made_of, indent=1), encoding="utf-8")
    accelerator.wait_for_everyone()
    files = {name: np.load(unfinished / f"{name}.npy", mmap_mode="r+") for name in whole}
    places = list(range(accelerator.process_index, len(rows), accelerator.num_processes))
    for start in range(0, len(places), batch_size):
        some = {int((row := rows[at])[ROW]): (at, row) for at in places[start : start + batch_size]}
        batch = collator([row for _, row in some.values()])
        images = batch.pixels.to(adapter.device).float() / 255
        latents = adapter.encode_images(images, sample=False, slice_size=2).to(adapter.dtype).cpu()
        latents = (latents.view(torch.int16) if half else latents).unflatten(0, (-1, 2)).numpy()
        for number, own, sizes in zip(batch.columns["row"].tolist(), latents, batch.sizes.view(-1, 2, 4), strict=True):
            if number in some:  # all rows of a batch may have been left out
                files["latents"][some[number][0]], files["sizes"][some[number][0]] = own, sizes.numpy()
    for file in files.values():
        file.flush()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not folder.is_dir():  # another run may have been as quick
        unfinished.rename(folder)
    accelerator.wait_for_everyone()


def _digest_of_vae(adapter: PipelineAdapter) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for name, tensor in sorted(adapter.pipeline.vae.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = adapter.pipeline.vae.config
    digest.update(str([config.get(name) for name in ("scaling_factor", "shift_factor")]).encode())
    return digest.hexdigest()


def _digest_of_pictures(rows: PairRows) -> str:
    """By their bytes; a file that is named by its path counts with its size and time of change."""
    digest = hashlib.blake2b(digest_size=20)
    for at in range(len(rows)):
        row = rows[at]
        for raw in (row.get(name) for name in PICTURES):
            if isinstance(raw, dict):
                raw = raw["bytes"] if raw.get("bytes") is not None else raw.get("path")
            if isinstance(raw, (str, os.PathLike)):
                path = Path(raw)
                there = path.stat() if path.is_file() else None
                raw = f"{path.resolve()} {there and (there.st_size, there.st_mtime_ns)}".encode()
            elif hasattr(raw, "tobytes"):
                raw = f"{raw.mode} {raw.size}".encode() + raw.tobytes()
            digest.update(hashlib.blake2b(raw or b"", digest_size=20).digest())
    return digest.hexdigest()
