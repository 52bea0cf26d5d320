"""Rows of which all that a model needs is kept: their keys, their numbers in place of them, and batches of these.

What is kept and where is feature_cache.py; here nothing runs a model.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from shared.data.rows import PADDING, ROW, Rows, Share
from shared.data.schema import Kind, to_conversation
from shared.errors import DataError
from shared.policies.base import GroupedBatch
from visionalign.collators import VLMCollator
from visionalign.families import SAMPLE, TOKEN
from visionalign.feature_store import FeatureStore
from visionalign.frozen_tower import TOWER_ONLY
from visionalign.processing import stacked

KEYS = "__keys__"  # in a light row: the keys of the row and of its images
_TOKEN, _OTHER = "token.", "extra."  # before the names of what the model takes beside a row's tokens

Keys = tuple[str, tuple[str, ...]]


class KnownRows(Rows):
    """Rows of which all that the model needs is kept.

    Args:
        rows: as they are without the cache.
        keys: of each.
    """

    def __init__(self, rows: Rows, keys: list[Keys]):
        super().__init__(rows.dataset, rows.kept, rows.left_out)
        self.keys = keys

    def light(self) -> LightRows:
        """The rows as CachedCollator takes them: nothing of the data set is read."""
        return LightRows(self)

    def share(self, rank: int, processes: int) -> Share:
        return Share(self.light(), rank, processes)


class LightRows(Dataset):
    """Numbers and keys in place of rows."""

    def __init__(self, known: KnownRows):
        self.kept, self.keys = known.kept, known.keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {ROW: index if self.kept is None else int(self.kept[index]), KEYS: self.keys[index]}


class CachedCollator:
    """Makes batches of light rows from what is kept of them, and of other rows as the plain collator does.

    Args:
        plain: the VLMCollator that rows are processed by.
        images, rows: the stores.
        names: of the features, as the model takes them.
    """

    def __init__(self, plain: VLMCollator, images: FeatureStore, rows: FeatureStore, names: list[str]):
        self.plain, self.images, self.rows, self.names = plain, images, rows, names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "plain" not in vars(self):
            raise AttributeError(name)
        return getattr(self.plain, name)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> GroupedBatch:
        """Collate rows to the batch that the plain collator would make, with features in the place of pixels."""
        if any(KEYS not in row for row in rows):
            return self.plain(rows)
        records = [self.rows[row[KEYS][0]] for row in rows]
        notes = {
            row[ROW]: bytes(record["note"].tolist()).decode()
            for row, record in zip(rows, records, strict=True)
            if len(record["note"])
        }
        kept = [(row, record) for row, record in zip(rows, records, strict=True) if len(record["ids"])]
        if not kept and self.plain.family.prefix_suffix:
            reasons = "; ".join(f"row {row}: {note.removeprefix('left out: ')}" for row, note in notes.items())
            raise DataError(f"No row of a batch can be used: {reasons}")
        batch = self._batch([record for _, record in kept], [bool(row.get(PADDING)) for row, _ in kept])
        keys = [image for row, _ in kept for image in row[KEYS][1]]
        entries = [self.images[key] for key in keys]
        for name in self.names if entries else []:
            flat = [entry[name].flatten(0, -2) for entry in entries]
            batch.model_inputs[name] = torch.cat(flat)
        batch.notes.update(notes)
        return batch

    def _batch(self, records: list[dict[str, Tensor]], filling: list[bool]) -> GroupedBatch:
        plain, pad = self.plain, self.plain.processor.tokenizer.pad_token_id
        if not records:  # a batch of which nothing is learnt: the step goes on without
            records = [{"ids": torch.tensor([pad]), "learnt": torch.tensor([False])}]
            filling = [True]
        lengths = [len(record["ids"]) for record in records]
        width = max(lengths) + -max(lengths) % (plain.pad_to_multiple_of or 1)
        ids = torch.full((len(records), width), pad)
        attention, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for at, (record, length) in enumerate(zip(records, lengths, strict=True)):
            ids[at, :length], attention[at, :length] = record["ids"], 1
            mask[at, :length] = 0 if filling[at] else record["learnt"]
        extras = {}
        for name in dict.fromkeys(name for record in records for name in record if name[:6] in (_TOKEN, _OTHER)):
            by_token, own = name.startswith(_TOKEN), name[6:]
            rows = by_token or plain.family.index.get(own) == SAMPLE
            value = stacked([record.get(name) for record in records], rows=rows)
            if by_token:
                value = F.pad(value, (0, 0) * (value.dim() - 2) + (0, width - value.shape[1]))
            extras[own] = value
        return GroupedBatch.of_rows(ids, attention=attention, mask=mask, model_inputs=extras)


class Processed(Dataset):
    """Rows processed one by one: (key, what is kept of the row, image key -> what the model takes for it).

    Args:
        known: all rows.
        at: which of them.
        collator: of whole batches.
    """

    def __init__(self, known: KnownRows, at: Sequence[int], collator: VLMCollator):
        self.known, self.at = known, at
        self.collator = _alone(collator, on_bad_row=collator.on_bad_row)
        self.single = _alone(collator, on_bad_row="error", max_length=None)

    def __len__(self) -> int:
        return len(self.at)

    def __getitem__(self, index: int) -> tuple[str, dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        row, (key, images) = self.known[self.at[index]], self.known.keys[self.at[index]]
        try:
            batch = self.collator([row])
        except DataError:
            if self.collator.on_bad_row == "error" or row[ROW] not in self.collator.skipped:
                raise
            reason = self.collator.skipped[row[ROW]]
            return key, _left_out(f"left out: {reason.removeprefix(f'row {row[ROW]}: ')}"), {}
        note = batch.notes.get(row[ROW], "")
        if note.startswith("left out"):
            return key, _left_out(note), {}
        family, shape = self.collator.family, batch.completion_ids.shape
        record = {"note": _text(note), "ids": batch.completion_ids[0].int(), "learnt": batch.completion_mask[0].bool()}
        for name, value in batch.model_inputs.items():
            if name not in TOWER_ONLY:
                by_token = family.index.get(name) == TOKEN if name in family.index else value.shape[:2] == shape
                record[(_TOKEN if by_token else _OTHER) + name] = value
        if len(images) == 1:
            return key, record, {images[0]: self._seen(batch)}
        raw = to_conversation(_columns(row), row[ROW], self.collator.kind).images
        alone = [self.single([_shown(image, self.collator.kind)]) for image in raw]
        return key, record, {name: self._seen(batch) for name, batch in zip(images, alone, strict=True)}

    def _seen(self, batch: GroupedBatch) -> dict[str, Tensor]:
        """What the model takes beside a row's tokens, but for what stands beside each token."""
        index, shape = self.collator.family.index, batch.completion_ids.shape
        extras = batch.model_inputs.items()
        return {name: v for name, v in extras if index.get(name) != TOKEN and v.shape[:2] != shape}


def _alone(collator: VLMCollator, **changed: Any) -> VLMCollator:
    """The collator for one row at a time."""
    collator = copy.copy(collator)
    vars(collator).update(pad_to_multiple_of=None, skipped={}, truncated={}, **changed)
    return collator


def _shown(image: Any, kind: Kind) -> dict[str, Any]:
    """A row that shows one image."""
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]}]
    said = [{"role": "assistant", "content": [{"type": "text", "text": "."}]}]
    if kind is Kind.MESSAGES:
        return {"images": [image], "messages": asked + said}
    return {"images": [image], "prompt": asked, "completion": said}


def _left_out(note: str) -> dict[str, Tensor]:
    return {"note": _text(note), "ids": torch.empty(0, dtype=torch.int), "learnt": torch.empty(0, dtype=torch.bool)}


def _text(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in (ROW, PADDING)}


def row_keys(row: dict[str, Any], at: int, kind: Kind) -> Keys:
    """What stands for a row's content, and for each of its images."""
    number = row.get(ROW, at)
    conversation = to_conversation(_columns(row), number, kind)
    if conversation.videos:
        raise DataError(f"row {number}: has a video; cache_vision_features is for images. Leave the cache out")
    images = tuple(map(image_key, conversation.images))
    extras = {name: conversation.extras.get(name) for name in ("tools", "chat_template_kwargs")}
    return digest(conversation.messages, conversation.prompt_messages, extras, images), images


def image_key(raw: Any) -> str:
    """What stands for an image's content: its bytes or pixels, or its file as it is now."""
    if isinstance(raw, Mapping):
        raw = raw["bytes"] if raw.get("bytes") is not None else raw["path"]
    if hasattr(raw, "convert"):
        try:
            raw.load()
            said = [raw.mode, raw.size, raw.getexif().get(0x0112), raw.info.get("transparency"), raw.getpalette(None)]
            return digest(said, hashlib.blake2b(raw.tobytes()).hexdigest())
        except Exception:  # PIL's readers raise many kinds; decoding it will say what is wrong
            return digest(raw.mode, raw.size, None)
    if isinstance(raw, (bytes, bytearray)):
        return digest("bytes", hashlib.blake2b(raw).hexdigest())
    path = os.path.abspath(os.fspath(raw))
    try:
        found = os.stat(path)
    except OSError:
        return digest(path, None)  # reading it will say what is wrong
    # copying tools set the one time back; nothing sets the other
    return digest(path, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def digest(*parts: Any) -> str:
    """What stands for some values; what JSON cannot write counts as its text."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()
