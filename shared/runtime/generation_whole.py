"""Generation by transformers' own `generate`, each completion a whole row: for models the loop is not right for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shared.runtime.generation_sampling import Sampling, StopStrings, lengths_by_ends


def generate_rows(
    model: nn.Module,
    inputs: dict[str, Any],
    group_size: int,
    sampling: Sampling,
    *,
    stops: StopStrings,
    ends: Sequence[int],
    pad: int,
    suppressed: Collection[int] = (),
    seed: int = 0,
    synced: bool = False,
) -> tuple[list[Tensor], list[bool]]:
    """Completions of each prompt, `group_size` after another, and whether they finished.

    Args:
        model: a transformers or PEFT model.
        inputs: as `model.generate` takes them, on its device.
        group_size: G.
        sampling: the settings.
        stops: its stop strings.
        ends: end tokens.
        pad: what fills a finished row.
        suppressed: tokens that are never drawn.
        seed: of all draws.
        synced: keep running passes until every process has finished.
    """
    width = inputs["input_ids"].shape[1]
    limits: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "eos_token_id": list(ends) or None}
    if sampling.greedy:
        limits |= {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None}
    else:
        limits |= {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
        limits |= {"top_p": sampling.top_p, "min_p": sampling.min_p, "num_return_sequences": group_size}
    if suppressed:
        limits["suppress_tokens"] = sorted(suppressed)
    stopping = _Stopping(stops, width) if stops else None
    device = inputs["input_ids"].device
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        tokens = model.generate(
            **inputs,
            **limits,
            repetition_penalty=sampling.repetition_penalty,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad,
            stopping_criteria=None if stopping is None else [stopping],
            synced_gpus=synced,
        )[:, width:].cpu()
    lengths, finished = lengths_by_ends(tokens, torch.tensor(list(ends), dtype=torch.long))
    if stopping is not None:
        for row, length in enumerate(stopping.lengths.tolist()):
            if length <= lengths[row]:
                lengths[row], finished[row] = length, True
    rows = [row[:length].clone() for row, length in zip(tokens, lengths.tolist(), strict=True)]
    done = finished.tolist()
    if sampling.greedy:
        rows = [row for row in rows for _ in range(group_size)]
        done = [each for each in done for _ in range(group_size)]
    return rows, done


class _Stopping:
    """A stopping criterion of transformers: which rows hold a stop string after their prompt."""

    def __init__(self, stops: StopStrings, width: int):
        self._stops, self._width = stops, width
        self.lengths = torch.empty(0)

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        count = ids.shape[1] - self._width
        if len(self.lengths) != len(ids):
            self.lengths = torch.full((len(ids),), 2**31)
        ends = self._stops.ends(ids[:, self._width :], count - 1)
        here = torch.tensor([2**31 if end is None else end for end in ends])
        self.lengths = torch.minimum(self.lengths, here)
        return (self.lengths <= count).to(ids.device)
