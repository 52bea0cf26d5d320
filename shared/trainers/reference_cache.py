"""Reference log-probabilities computed once, before training, and kept on disk for later runs.

They are kept for each token of each answer, under a key of what they depend on: the reference's weights and the type
they are held in, the rows' tokens (of rows with images, what they are made of), and the type of the computation.
Learning rate, β, the objective and its weights are not among these, so that runs which differ in them pay once. One
folder a key:

    $TRIALIGN_CACHE/reference/<key>/chosen_ref_logp.npy   flat float32, row after row
                                    rejected_ref_logp.npy
                                    chosen_ref_logp.lengths.npy   where the rows themselves do not tell
                                    made_of.json          what the key stands for, to be read by people

`$TRIALIGN_CACHE` is ~/.cache/trialign where it is not set. Nothing is ever deleted here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shared.builtin import is_builtin
from shared.cache import cache_folder
from shared.data.rows import ROW, Extended, Rows
from shared.data.tokens import Ragged, TokenTable
from shared.errors import UserError
from shared.policies.base import GroupedBatch
from shared.trainers.reference import AdapterOff, Reference, unwrapped
from shared.trainers.reference_adapter import adapter_tensors, gathered
from shared.trainers.reference_checks import STREAMED

FORMAT = 1  # raised when the same reference comes to give other figures
WEIGHT_FILES = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
WRAPPERS = {"base_layer", "original_module", "token_adapter"}  # what PEFT puts into the names of a model's own weights
# of a model's or an adapter's configuration: what its figures do not depend on
IDLE = {"_name_or_path", "transformers_version", "architectures", "dtype", "use_cache", "pad_token_id", "bos_token_id",
        "eos_token_id", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
        "target_modules", "exclude_modules", "lora_dropout", "init_lora_weights", "task_type"}  # fmt: skip


def weights_of_name(name: str, *, revision: str | None = None, **loading: Any) -> str | None:
    """What stands for a model's weights in the key, without loading them; None where its name does not say.

    Args:
        name: hub id or folder. A folder's files count with their names, sizes and times of change.
        revision: branch, tag or commit.
        loading: options that change what the model computes (dtype, quantisation, …).
    """
    if is_builtin(name):
        return None  # drawn from a seed
    files = []
    if Path(name).is_dir():
        found = sorted(path for pattern in WEIGHT_FILES for path in Path(name).glob(pattern))
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found]
        name = str(Path(name).resolve())
    else:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(cached, str):
            return None
        revision = Path(cached).parent.name  # the commit: a branch moves
    return json.dumps([name, revision, files, {k: str(v) for k, v in sorted(loading.items())}])


@torch.no_grad()
def weights_of_model(model: nn.Module, reference: Reference | None = None) -> str:
    """What stands for a model's weights in the key: a digest of all of them. All processes call it together.

    A model with its adapter off has the digest of its base model.

    Args:
        model: the reference model, wrapped or not.
        reference: with AdapterOff, adapters that it does not run with do not count.
    """
    inner = unwrapped(model)
    used = reference.adapter if isinstance(reference, AdapterOff) else None
    adapters = getattr(inner, "peft_config", {})
    unused = {id(t) for adapter in adapters if adapter != used for t in adapter_tensors(inner, adapter).values()}
    base = inner.get_base_model() if adapters else inner
    configurations = [base.config, adapters[used]] if used in adapters else [base.config]
    digest = hashlib.blake2b(digest_size=20)
    for configuration in configurations:
        settings = {name: value for name, value in configuration.to_dict().items() if name not in IDLE}
        digest.update(json.dumps(settings, sort_keys=True, default=_as_text).encode())
    tensors = {
        _plain_name(name, used) if adapters else name: tensor
        for name, tensor in inner.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and id(tensor) not in unused
    }
    for name, tensor in sorted(tensors.items()):
        with gathered(tensor):
            whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().contiguous()
            digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
            digest.update(whole.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain_name(name: str, adapter: str | None) -> str:
    """A tensor's name without what PEFT added, and a star for the name that was given to the adapter."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join("*" if part == adapter else part for part in parts if part not in WRAPPERS)


def _as_text(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set) else str(value)


# names of columns, those of a batch's members in turn -> the batch, or what of it has them
Parts = Mapping[tuple[str, ...], Callable[[Any], GroupedBatch]]
PAIRED: Parts = {("chosen_ref_logp", "rejected_ref_logp"): lambda batch: batch}


def precompute(
    reference: Reference | Callable[[], Reference],
    rows: TokenTable | Rows,
    collator: Callable[[list[dict[str, Any]]], GroupedBatch],
    *,
    weights: str,
    model: nn.Module,
    accelerator: Accelerator,
    batch_size: int,
    what: str = "train",
    content: str | None = None,
    parts: Parts = PAIRED,
) -> TokenTable | Rows:
    """The rows with the reference's log-probabilities of each token of their answers, computed or from the cache.

    All processes call it together; each runs its share of the rows, where possible of like lengths at a time.

    Args:
        reference: the reference, or what makes it: called only where there is something to compute.
        rows: preference rows, or unpaired ones, as tokens; or rows that become tokens in the collator, whose batches
            then tell which rows they hold in `columns["row"]`.
        collator: makes a batch of rows; without KL pairs for unpaired rows.
        weights: what stands for the reference's weights: from `weights_of_name` or `weights_of_model`.
        model: the policy's model as it can be run now.
        accelerator: of the trainer.
        batch_size: rows a process runs at a time.
        what: the rows' name in the line that is printed.
        content: of rows that become tokens in the collator, what stands for them and for how they become tokens.
        parts: of those, which columns are made of what.

    Returns:
        The rows with columns `chosen_ref_logp` and `rejected_ref_logp`, `completion_ref_logp`, or those of `parts`:
        float32, one value a token.

    Raises:
        UserError: rows that are streamed or hold no answers.
    """
    lengths: dict[str, np.ndarray] | None = None
    if content is None:
        columns = _columns(rows)
        parts = {tuple(columns.values()): lambda batch: batch}
        lengths = {name: rows.columns[ids].lengths for ids, name in columns.items()}
    names = [name for part in parts for name in part]
    made_of = {
        "format": FORMAT,
        "weights": weights,
        "tokens": content or _digest_of_tokens(rows),
        "computed in": accelerator.mixed_precision,
    }
    key = hashlib.blake2b(json.dumps(made_of).encode(), digest_size=16).hexdigest()
    folder = cache_folder("reference") / broadcast_object_list([key])[0]
    started = time.perf_counter()
    known = all(gather_object([_is_complete(folder, names, len(rows), lengths)]))
    if not known:
        reference = reference if isinstance(reference, Reference) else reference()
        values = _computed(reference, rows, collator, parts, model, accelerator, batch_size)
        if accelerator.is_local_main_process:
            _write(folder, values, made_of, with_lengths=lengths is None)
        accelerator.wait_for_everyone()
    if accelerator.is_main_process and len(rows):
        seconds = time.perf_counter() - started
        how = f"in {seconds:.1f} s ({len(rows) / seconds:,.0f} rows/s), kept in" if not known else "from cache:"
        print(f"Reference log-probabilities of {what}: {len(rows):,} rows {how} {folder}", flush=True)
    lengths = lengths or {name: _opened(folder, f"{name}.lengths") for name in names}
    made = {name: Ragged.of_lengths(_opened(folder, name), lengths[name]) for name in names}
    if content is not None:
        return Extended(rows, made)
    for name, column in made.items():
        rows = rows.with_column(name, column)
    return rows


def _columns(table: TokenTable) -> dict[str, str]:
    """The answers' token columns, in the order of a batch's members, and the columns that are made for them."""
    if not isinstance(table, TokenTable):
        raise UserError(STREAMED)
    if "chosen_ids" in table.columns:
        return {"chosen_ids": "chosen_ref_logp", "rejected_ids": "rejected_ref_logp"}
    if "completion_ids" in table.columns:
        return {"completion_ids": "completion_ref_logp"}
    raise UserError(f"precompute_ref_log_probs: rows of {', '.join(table.columns)} hold no answers to a prompt.")


def _digest_of_tokens(table: TokenTable) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for name, column in sorted(table.columns.items()):
        if name.endswith("_ids"):
            column = column.compact()
            digest.update(f"{name} {len(column)}".encode())
            digest.update(column.lengths)
            digest.update(np.ascontiguousarray(column.values))
    return digest.hexdigest()


def _computed(
    reference: Reference,
    rows: TokenTable | Rows,
    collator: Callable,
    parts: Parts,
    model: nn.Module,
    accelerator: Accelerator,
    batch_size: int,
) -> dict[str, list[np.ndarray]]:
    """One array a row for each column, on every process; an empty one for a row that the collator left out."""
    order = np.arange(len(rows))
    if isinstance(rows, TokenTable):
        order = np.argsort(-rows.lengths, kind="stable")  # rows of like lengths in a batch; the longest show first
        rows = rows.select(order)
    rank, processes = accelerator.process_index, accelerator.num_processes
    share, places = rows.share(rank, processes), order[rank::processes].tolist()
    mine: list[tuple[int, str, np.ndarray]] = []
    for start in range(0, len(share), batch_size):
        some = [share[at] for at in range(start, min(start + batch_size, len(share)))]
        own = places[start : start + len(some)]  # fewer where the share is filled up
        batch = collator(some).to(accelerator.device)
        if "row" in batch.columns:  # rows may have been left out
            numbered = {row[ROW]: place for row, place in zip(some, own, strict=False)}
            own = [numbered.get(number) for number in batch.columns["row"].tolist()]
        for names, part_of in parts.items():
            part = part_of(batch)
            with accelerator.autocast():
                logp = reference.log_probs(model, part).cpu().numpy()
            lengths = part.completion_attention.sum(1).tolist()
            for at, place in enumerate(own):
                if place is not None:
                    first = at * part.group_size
                    mine += [(place, name, logp[i][: lengths[i]]) for i, name in enumerate(names, start=first)]
    whole = {name: [np.empty(0, np.float32)] * len(order) for part in parts for name in part}
    for place, name, values in (found for shared in gather_object([mine]) for found in shared):
        whole[name][place] = values.astype(np.float32)
    return whole


def _is_complete(folder: Path, names: list[str], count: int, lengths: Mapping[str, np.ndarray] | None) -> bool:
    if not folder.is_dir():
        return False
    known = {name: lengths[name] if lengths else _opened(folder, f"{name}.lengths") for name in names}
    return all(len(own) == count and len(_opened(folder, name)) == own.sum() for name, own in known.items())


def _opened(folder: Path, name: str) -> np.ndarray:
    path = folder / f"{name}.npy"
    return np.load(path, mmap_mode="r" if path.stat().st_size > 128 else None)  # an empty array cannot be mapped


def _write(
    folder: Path, values: Mapping[str, list[np.ndarray]], made_of: dict[str, Any], *, with_lengths: bool
) -> None:
    """Write a folder so that it is there whole or not at all."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        for name, arrays in values.items():
            np.save(unfinished / f"{name}.npy", np.concatenate([np.empty(0, np.float32), *arrays]))
            if with_lengths:
                np.save(unfinished / f"{name}.lengths.npy", np.array([len(array) for array in arrays], np.int64))
        (unfinished / "made_of.json").write_text(json.dumps(made_of, indent=1), encoding="utf-8")
        if not folder.is_dir():  # another run, or another machine's process, was as quick
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
