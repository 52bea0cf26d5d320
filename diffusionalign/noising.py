"""Noise for clean pictures, and its levels, drawn alike whatever processes and micro-batches share the pictures."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def seeded(*of: Any) -> torch.Generator:
    """A generator on the processor that depends on the values alone: on no process, batch or device."""
    digest = hashlib.blake2b(" ".join(map(str, of)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def drawn_levels(count: int, levels: int, *, random: torch.Generator, middle: bool = False) -> Tensor:
    """`(count,)` levels of noise, one from each of `count` equal shares of them.

    Args:
        count: how many.
        levels: T.
        random: what draws.
        middle: more of those in the middle: the sigmoid of a standard normal (SD3: Esser et al. 2024,
            arXiv:2403.03206, section 3.1).
    """
    share = (torch.arange(count) + torch.rand(count, generator=random)) / count
    if middle:
        share = torch.special.ndtri(share.double().clamp(1e-6, 1 - 1e-6)).sigmoid()
    return (share * levels).long().clamp(max=levels - 1)
