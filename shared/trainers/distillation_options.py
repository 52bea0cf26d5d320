"""Options of distillation, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shared.runtime.arguments import AlignOptions
from shared.runtime.options import option


@dataclass
class DistillationOptions(AlignOptions):
    """Distillation."""

    teacher_model_name_or_path: str | None = option(
        None, "Teacher. Unset: the model without its adapter, where it has one."
    )
    teacher_model_init_kwargs: dict[str, Any] | None = option(
        None, 'Further arguments of from_pretrained for the teacher, as JSON: {"dtype": "bfloat16"}.'
    )
    teacher_load_in_8bit: bool = option(False, "Hold the teacher in 8 bits (bitsandbytes).")
    teacher_load_in_4bit: bool = option(False, "Hold the teacher in 4 bits (bitsandbytes).")
    lmbda: float = option(
        0.5, "λ, share of the rows whose answer the student writes itself; the others are those of the data."
    )
    beta: float = option(
        0.5,
        "β of the Jensen-Shannon divergence: 0 is the forward divergence, which covers what the teacher does, 1 the "
        "reverse one, which keeps to what it does most.",
    )
    seq_kd: bool = option(False, "Let the teacher write the answers of the other rows (sequence-level distillation).")
    temperature: float = option(0.9, "Divides the logits where answers are written; 0: the most likely token.")
    loss_temperature: float = option(1.0, "Divides both models' logits in the divergence.")
    max_new_tokens: int = option(
        128, "Longest answer that student or teacher writes, in training and before and after it, in tokens."
    )
    generation_rows: int | None = option(
        None, "Answers that are written at once on each process. Unset: all of an optimizer step."
    )
    ds3_gather_for_generation: bool = option(
        True, "Under ZeRO-3: gather the whole model to write with; faster, where it fits."
    )
    disable_dropout: bool = option(True, "Train without dropout, an adapter's neither.")
