"""Keeping things as they were: random states through an evaluation, weights through a restart."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from shared.errors import UserError
from shared.runtime.models import without_progress_bars


@contextlib.contextmanager
def preserved_randomness() -> Iterator[None]:
    """Whatever happens inside draws no random number from the training: a run with evaluations equals one without."""
    python, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy_state)


def restore_weights(model: PreTrainedModel, folder: str) -> None:
    """Put a checkpoint's weights back by the model's own loader.

    transformers saves many models under other names than their modules have (LLaVA's `language_model.model.…`), and
    its Trainer loads by module name, not strictly: such a checkpoint would leave the weights as they were.
    """
    try:
        with without_progress_bars():
            saved = type(model).from_pretrained(folder, dtype=model.dtype)
        model.load_state_dict(saved.state_dict(), strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{folder} is not a checkpoint of this model ({type(model).__name__}): {str(error).splitlines()[0]} "
            "Resume with the model and adapter options of the run that wrote it; run.yaml beside it holds them."
        ) from error
