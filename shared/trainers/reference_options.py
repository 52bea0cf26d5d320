"""Options of the trainers that hold a model near a reference, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shared.runtime.arguments import AlignOptions
from shared.runtime.options import option


@dataclass
class WholeReferenceOptions(AlignOptions):
    """Reference model."""

    ref_num_shared_layers: ClassVar[int | None] = None
    ref_load_in_8bit: ClassVar[bool] = False

    ref_model_name_or_path: str | None = option(
        None, "Reference model. Unset: the model as it is at the start (with an adapter: without it)."
    )
    sync_ref_model: bool = option(
        False, "Move the reference towards the model while training (TR-DPO, arXiv:2404.09656)."
    )
    ref_model_mixup_alpha: float = option(
        0.6, "Share of the model in the reference at each move.", needs="sync_ref_model"
    )
    ref_model_sync_steps: int = option(512, "Steps between two moves of the reference.", needs="sync_ref_model")


@dataclass
class ReferenceModelOptions(WholeReferenceOptions):
    """Reference model."""

    ref_num_shared_layers: int | None = option(
        None, "Freeze so many lower layers and share them with the reference, in memory and in computation."
    )
    ref_load_in_8bit: bool = option(False, "Hold the reference in 8 bits (bitsandbytes).")
