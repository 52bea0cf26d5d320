"""Where the tokens behind a prompt stand, for models that place what they see by time, height and width (Qwen-VL)."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn

_MARK = "continues_from_last"


def continue_from_last(body: nn.Module) -> None:
    """Have a model's `rope_deltas` count on behind a prompt from the prompt's last token, as its rows do.

    transformers takes them from the prompt's largest position. That is the last frame of a video that has more frames
    than places across and words behind it, so what is run behind a prompt would stand elsewhere than the same tokens
    in a row, and elsewhere than `generate` puts them. Other models are left as they are.

    Args:
        body: a transformers model below its head.
    """
    plain = getattr(body, "get_rope_index", None)
    if plain is None or not hasattr(body, "rope_deltas") or hasattr(plain, _MARK):
        return
    own = plain.__func__

    @functools.wraps(own)
    def placed(self: nn.Module, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        positions, deltas = own(self, input_ids, *args, **kwargs)
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device).bool()
        last = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        # Height and width: behind a video the next token's place does not depend on the number of its frames.
        after = positions[1:, torch.arange(len(last), device=mask.device), last].amax(0) + 1
        return positions, (after - mask.sum(1)).unsqueeze(1).to(deltas)

    setattr(placed, _MARK, True)
    body.get_rope_index = types.MethodType(placed, body)
