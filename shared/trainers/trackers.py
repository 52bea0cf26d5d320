"""Pictures handed to the trackers that `report_to` names: TensorBoard, Weights & Biases, trackio.

Figures go there by transformers' own callbacks, whose connections are used here. None of the trackers is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from shared.runtime.report_pictures import enlarged

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import Trainer


def hand_over(trainer: Trainer, tag: str, images: Sequence[Image], captions: Sequence[str]) -> None:
    """Give pictures to the trackers that are at work, at the trainer's step; only the first process does.

    Args:
        trainer: its callbacks hold the trackers.
        tag: what the pictures are called there.
        images: RGB; small ones are enlarged, as in the run report.
        captions: one a picture.
    """
    if not trainer.state.is_world_process_zero or not images:
        return
    step, images = trainer.state.global_step, [enlarged(image) for image in images]
    for callback in trainer.callback_handler.callbacks:
        for kind, give in _TRACKERS.items():
            if isinstance(callback, kind):
                give(callback, tag, images, captions, step)


def without_model_config(trainer: Trainer) -> None:
    """Keep TensorBoard's callback from writing down the model's config: that of a pipeline's model cannot be written.

    Args:
        trainer: its callbacks are there.
    """
    callbacks = trainer.callback_handler.callbacks
    for at, callback in enumerate(callbacks):
        if type(callback) is TensorBoardCallback:
            callbacks[at] = _PlainTensorBoard(callback.tb_writer)


class _PlainTensorBoard(TensorBoardCallback):
    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)


def _to_tensorboard(callback: Any, tag: str, images: Sequence[Image], captions: Sequence[str], step: int) -> None:
    writer = callback.tb_writer
    if writer is None:
        return
    by_size: dict[tuple[int, int], list[np.ndarray]] = {}
    for image in images:
        by_size.setdefault(image.size, []).append(np.asarray(image.convert("RGB")))
    for (width, height), same in by_size.items():
        name = tag if len(by_size) == 1 else f"{tag}/{width}x{height}"
        writer.add_images(name, np.stack(same), step, dataformats="NHWC")
    writer.add_text(f"{tag}/captions", "\n".join(f"{at}. {each}" for at, each in enumerate(captions, 1)), step)


def _to_wandb(callback: Any, tag: str, images: Sequence[Image], captions: Sequence[str], step: int) -> None:
    wandb = callback._wandb
    if wandb is None or wandb.run is None:
        return
    shown = [wandb.Image(image, caption=caption) for image, caption in zip(images, captions, strict=True)]
    wandb.log({tag: shown, "train/global_step": step})


def _to_trackio(callback: Any, tag: str, images: Sequence[Image], captions: Sequence[str], step: int) -> None:
    trackio = callback._trackio
    if trackio is None or not callback._initialized:
        return
    shown = {
        f"{tag}/{at}": trackio.Image(image, caption=caption)
        for at, (image, caption) in enumerate(zip(images, captions, strict=True), start=1)
    }
    trackio.log({**shown, "train/global_step": step})


_TRACKERS = {TensorBoardCallback: _to_tensorboard, WandbCallback: _to_wandb, TrackioCallback: _to_trackio}
