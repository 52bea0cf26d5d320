"""Options of supervised fine-tuning on text, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shared.runtime.options import option
from textalign.options import TextOptions


@dataclass
class SFTOptions(TextOptions):
    """Supervised fine-tuning."""

    learning_rate: float = option(2e-5, "Peak learning rate of AdamW.")
    loss_type: Literal["nll", "dft", "chunked_nll"] = option(
        "nll",
        "Objective: negative log-likelihood, or dynamic fine-tuning (arXiv:2508.05629). chunked_nll: nll, which never "
        "makes whole logits here.",
    )
    completion_only_loss: bool | None = option(
        None,
        "Learn the completion alone, in rows of prompt and completion. Unset: yes; in tokenised rows, where they have "
        "a completion_mask.",
    )
    assistant_only_loss: bool = option(
        False,
        "Learn the assistant's turns alone: of messages all, of prompt and completion those of the completion. "
        "Tokenised rows with assistant_masks are learnt so in any case.",
    )
    dataset_text_field: str = option("text", "Column of plain text.")
    dataset_kwargs: dict[str, Any] | None = option(
        None, 'As JSON: {"skip_prepare_dataset": true} says that the rows are tokenised (input_ids). Nothing else.'
    )
    shuffle_dataset: bool = option(False, "Shuffle the training rows once, before they are packed.")
    packing: bool = option(False, "Put several documents into a row of max_length tokens. They do not see each other.")
    packing_strategy: Literal["bfd", "bfd_split", "wrapped"] = option(
        "bfd",
        "bfd: best fit, longer documents cut at max_length and counted; bfd_split: best fit, longer documents go on "
        "in another row; wrapped: one after the other, cut wherever a row ends.",
        needs="packing",
    )
    eval_packing: bool | None = option(None, "Pack the held-out rows too. Unset: as packing.")
    padding_free: bool | None = option(
        None,
        "Put all rows of a batch into one, without padding. Unset: with flash attention only, since the others pay "
        "for the square of that row's length.",
    )
    activation_offloading: bool = option(
        False, "Keep in the processor's memory what the backward pass needs: slower, and for larger batches."
    )
