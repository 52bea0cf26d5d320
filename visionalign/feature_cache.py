"""Vision features computed once an image, before training, and kept on disk; steps neither see nor process an image.

What a frozen tower gives for an image (frozen_tower.py) and what the processor gives for a row, its pixels left out,
are kept in two stores (feature_store.py) under keys of what they depend on:

    $TRIALIGN_CACHE/vision-features/images/<model>/    digest of an image's content -> its features
                                    rows/<processor>/  digest of a row's content -> its tokens, and which are learnt

<model> stands for the weights, the processor's settings and the type of the computation, <processor> for its tokenizer
and settings and what the collator does with rows. An image in a file counts by path, size and times of change.

Deliberately not here: videos, and models that an engine cuts up.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shared.cache import cache_folder
from shared.data.rows import Rows
from shared.errors import UserError
from shared.policies.base import GroupedBatch
from shared.policies.prefix import evaluating
from shared.policies.token import in_model_type
from shared.trainers.keeping import preserved_randomness
from visionalign.collators import VLMCollator
from visionalign.feature_rows import CachedCollator, Keys, KnownRows, Processed, digest, row_keys
from visionalign.feature_store import FeatureStore, Writer
from visionalign.frozen_tower import TOWER_ONLY, FrozenTower
from visionalign.preparing import shards_the_model

FORMAT = 1  # raised when the same inputs come to give other entries
WINDOW = 32  # rows that are looked through for images of one size, which go through the tower together


def check_cache(rows: Any, collator: Any) -> None:
    """Raise UserError where features cannot be kept for a run, as far as is known before a model is loaded."""
    if type(collator) is not VLMCollator:
        raise UserError(
            f"cache_vision_features: data_collator is a {type(collator).__name__}; what it makes of rows cannot be "
            "kept. Leave one of the two out."
        )
    if not isinstance(rows, Rows):
        raise UserError(
            "cache_vision_features: the data set is streamed, so its images cannot be seen beforehand. Load it whole, "
            "or leave the cache out."
        )
    if shards_the_model():
        raise UserError(
            "cache_vision_features: not with an engine that cuts the model up (DeepSpeed, FSDP). Train data-parallel "
            "without such an engine, or leave the cache out."
        )


def cache_features(trainer: Any) -> FeatureCache:
    """Put what is kept in the place of a trainer's rows and collator, computing what is not; its options say where.

    Held-out rows still show their images where answers are asked for.
    """
    args, held_out = trainer.args, trainer.eval_dataset
    cache = FeatureCache(
        trainer.model,
        trainer.data_collator,
        trainer.accelerator,
        folder=args.vision_cache_dir,
        batch_size=args.per_device_eval_batch_size,
        workers=args.dataloader_num_workers,
    )
    with preserved_randomness():
        trainer.train_dataset = cache.known(trainer.train_dataset).light()
        if isinstance(held_out, dict):
            trainer.eval_dataset = {name: cache.known(rows, name) for name, rows in held_out.items()}
        elif held_out is not None:
            trainer.eval_dataset = cache.known(held_out, "eval")
    trainer.data_collator = cache.collator
    return cache


class FeatureCache:
    """The features of a model's frozen vision tower, and of its projector where that is frozen too.

    Args:
        model: the model to train, with its adapter, where it runs.
        collator: of its rows, as they are without the cache.
        accelerator: of the trainer.
        folder: holds the stores; None: `$TRIALIGN_CACHE/vision-features`.
        batch_size: images of one size that go through the tower together.
        workers: data-loader processes that read and process images beforehand.

    Raises:
        UserError: a tower that trains, or a family whose features cannot be kept.
    """

    def __init__(
        self,
        model: nn.Module,
        collator: VLMCollator,
        accelerator: Accelerator,
        *,
        folder: str | Path | None = None,
        batch_size: int = 8,
        workers: int = 0,
    ):
        self.model, self.accelerator = model, accelerator
        self.batch_size, self.workers = batch_size, workers
        self.tower = FrozenTower(model, collator.family)
        folder = Path(os.path.expanduser(folder)) if folder else cache_folder("vision-features")
        self._weights = self._weights_digest()
        images, rows = self._digests(collator)
        self.images, self.rows = FeatureStore(folder / "images" / images), FeatureStore(folder / "rows" / rows)
        self.plain = collator
        self.collator = CachedCollator(collator, self.images, self.rows, self.tower.names)

    def known(self, rows: Rows, what: str = "train") -> KnownRows:
        """The rows, with all that the model needs of them kept; all processes call it together.

        Args:
            what: the rows' name in the line that is printed.

        Raises:
            DataError: a row that cannot be used, named; or one with a video.
        """
        started = time.perf_counter()
        known = KnownRows(rows, self._keys(rows))
        images = {image for _, each in known.keys for image in each}
        before = sum(image in self.images for image in images)
        world = (self.accelerator.process_index, self.accelerator.num_processes)
        size = int(os.environ.get("LOCAL_WORLD_SIZE", world[1]))
        for rank, count in (world, (self.accelerator.local_process_index, size)):  # then what other machines hold
            self._compute(known, [at for at in range(len(rows)) if not self._has(known.keys[at])][rank::count])
            self.accelerator.wait_for_everyone()
            self.images.refresh()
            self.rows.refresh()
        kept = [image for image in images if image in self.images]
        if kept:
            self.tower.teach(list(self.images[kept[0]].values()))
            self._check(known)
        if self.accelerator.is_main_process:
            seconds, new = time.perf_counter() - started, len(kept) - before
            how = f"{new:,} of them computed in {seconds:.1f} s ({new / seconds:,.0f}/s), kept in" if new else "from"
            print(f"Vision features of {what}: {len(kept):,} images of {len(rows):,} rows, {how} {self.images.folder}")
        return known

    def check_weights(self) -> None:
        """Raise UserError where the tower's weights, or a frozen projector's, are no longer those of the features."""
        if self._weights_digest() != self._weights:
            frozen = "vision tower or projector" if self.tower.past_projector else "vision tower"
            raise UserError(
                f"cache_vision_features: the checkpoint has another {frozen} than the model that the features are of. "
                "Give its folder as the model (--model_name_or_path) in place of --resume_from_checkpoint, or leave "
                "the cache out."
            )

    def _has(self, keys: Keys) -> bool:
        row, images = keys
        if row not in self.rows:
            return False
        return all(image in self.images for image in images) or not len(self.rows[row]["ids"])  # which is left out

    def _keys(self, rows: Rows) -> list[Keys]:
        """The keys of all rows; each process reads its share."""
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        mine = [row_keys(rows[at], at, self.plain.kind) for at in range(rank, len(rows), count)]
        shares = gather_object([mine])
        return [shares[at % count][at // count] for at in range(len(rows))]

    def _compute(self, known: KnownRows, at: Sequence[int]) -> None:
        """Write the entries of some rows and of their images."""
        seen, todo = set(), []
        for place in at:
            if known.keys[place] not in seen:
                seen.add(known.keys[place])
                todo.append(place)
        loader = DataLoader(
            Processed(known, todo, self.plain),
            batch_size=WINDOW,
            collate_fn=_arrays,
            num_workers=self.workers if len(todo) > WINDOW else 0,
        )
        done: set[str] = set()
        passed, estimated = 0, False
        with self.rows.writer() as rows, self.images.writer() as images:
            for window in loader:
                waiting: dict[Any, dict[str, dict[str, Tensor]]] = defaultdict(dict)
                for key, record, inputs in window:
                    if key not in self.rows:
                        rows.add(key, _tensors(record))
                    for image, pixels in ((image, _tensors(each)) for image, each in inputs.items()):
                        if image not in self.images and image not in done:
                            done.add(image)
                            waiting[_size(pixels)][image] = pixels
                for alike in waiting.values():
                    self._record(alike, images)
                passed += len(window)
                if images.written and not estimated:
                    estimated = True
                    images.check_space(images.written / passed * (len(todo) - passed))

    def _record(self, alike: dict[str, dict[str, Tensor]], writer: Writer) -> None:
        """Run the tower on images of one size and write what it gives."""
        keys = list(alike)
        for start in range(0, len(keys), self.batch_size):
            some = keys[start : start + self.batch_size]
            stacked = {name: torch.cat([alike[key][name] for key in some]) for name in alike[some[0]]}
            with self.accelerator.autocast():
                features = self.tower.record(self._placed(stacked))
            apart = [each.chunk(len(some)) for each in features]
            for at, key in enumerate(some):
                writer.add(key, dict(zip(self.tower.names, (each[at] for each in apart), strict=True)))

    def _placed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model takes, on its device and in its type."""
        empty = torch.empty(0, 0, dtype=torch.long)
        batch = GroupedBatch.of_rows(empty, attention=empty, mask=empty, model_inputs=inputs)
        return in_model_type(self.model, batch.to(self.accelerator.device)).model_inputs

    def _check(self, known: KnownRows) -> None:
        """Raise UserError where the features do not lead to what the model itself sees in the first rows."""
        light, body = known.light(), self.tower.body
        usable = (at for at, (row, images) in enumerate(known.keys) if images and len(self.rows[row]["ids"]))
        picked = [at for at, _ in zip(usable, range(2), strict=False)]
        if not picked:
            return
        states = []
        for batch in (self.plain([known[at] for at in picked]), self.collator([light[at] for at in picked])):
            inputs = self._placed(
                {
                    "input_ids": batch.completion_ids,
                    "attention_mask": batch.completion_attention,
                    **batch.model_inputs,
                }
            )
            with evaluating(body), self.accelerator.autocast():
                hidden = body(**inputs, use_cache=False)[0]
            states.append(hidden[batch.completion_attention.bool().to(hidden.device)].float())
        own, ours = states
        half = self.accelerator.mixed_precision != "no" or hidden.dtype != torch.float32
        apart = ((own - ours).abs().mean() / own.abs().mean()).item()
        if not apart <= (0.05 if half else 1e-3):
            raise UserError(
                f"cache_vision_features: a {type(self.tower.model).__name__} sees something else in features that are "
                f"kept (its hidden states differ by {apart:.2g}). Leave the cache out."
            )

    def _digests(self, collator: VLMCollator) -> tuple[str, str]:
        """What stands for the model, and for the processor with the collator."""
        config = self.tower.model.config
        processor, reader = collator.processor, collator.reader
        settings = {
            "format": [FORMAT, transformers.__version__],
            "processor": processor.to_dict(),
            "max_pixels": reader.max_pixels,
        }
        model = {
            "config": {name: value for name, value in config.to_dict().items() if name != "text_config"},
            "attention": config._attn_implementation,
            "past_projector": self.tower.past_projector,
            "computed": [self.accelerator.mixed_precision, self.accelerator.device.type],
        }
        tokens = {
            "tokenizer": [processor.tokenizer.backend_tokenizer.to_str(), processor.tokenizer.special_tokens_map],
            "template": getattr(processor, "chat_template", None) or processor.tokenizer.chat_template,
            "read": [collator.family.name, collator.kind],
            "collator": [_plain(vars(collator)), _plain(vars(reader))],
        }
        return digest(settings, model, self._weights), digest(settings, tokens)

    def _weights_digest(self) -> str:
        weights = hashlib.blake2b(digest_size=16)
        for name, tensor in self.tower.tensors():
            whole = tensor.detach().cpu().contiguous()
            weights.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
            weights.update(whole.flatten().view(torch.uint8).numpy())
        return weights.hexdigest()


def _arrays(window: list[tuple[str, dict[str, Tensor], dict[str, dict[str, Tensor]]]]) -> list[tuple[Any, ...]]:
    """Processed rows as data workers send them: each tensor in shared memory would hold a file open."""
    return [
        (key, _numpy(record), {image: _numpy(each) for image, each in inputs.items()})
        for key, record, inputs in window
    ]


def _numpy(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in values.items()}


def _tensors(values: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in values.items()}


def _size(inputs: dict[str, Tensor]) -> tuple[Any, ...]:
    """What images have to have in common to go through the tower together: shapes, and what the model is told."""
    told = {name: value for name, value in inputs.items() if name not in TOWER_ONLY}
    shapes = [(name, tuple(value.shape)) for name, value in sorted(inputs.items())]
    return *shapes, *((name, value.numpy().tobytes()) for name, value in sorted(told.items()))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The settings among an object's attributes."""
    batches = ("pad_to_multiple_of", "always_image", "always_video")
    simple = (str, int, float, bool, type(None), dict)
    return {k: v for k, v in values.items() if isinstance(v, simple) and k not in ("skipped", "truncated", *batches)}
