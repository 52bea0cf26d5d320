"""Rewards of a prompt compared with the last ones of the same prompt, over rounds (DDPO's per-prompt statistics)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor


class PromptStatistics:
    """The last rewards of each prompt (Black et al. 2023, arXiv:2305.13301).

    Args:
        buffer_size: rewards that are remembered of a prompt.
        min_count: of a prompt with fewer, rewards are compared with the whole round.
        eps: what keeps the division by the deviation from blowing up.

    Attributes:
        rewards: prompt -> its last rewards.
    """

    def __init__(self, buffer_size: int, min_count: int, *, eps: float = 1e-8):
        self.buffer_size, self.min_count, self.eps = buffer_size, min_count, eps
        self.rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: Sequence[str], rewards_B: Tensor) -> Tensor:
        """`(R - mean) / (deviation + eps)` with the statistics of each row's prompt, these rewards taken in first.

        Args:
            prompts: B.
            rewards_B: `(B,)` of any number type, over all processes, so that all remember the same; NaN where a row
                has no reward.

        Returns:
            `(B,)` float32; 0 for a row without a reward. The deviation is that of a population.
        """
        rewards = rewards_B.double()
        given = rewards[~rewards.isnan()]
        rows: dict[str, list[int]] = {}
        for at, prompt in enumerate(prompts):
            rows.setdefault(prompt, []).append(at)
        found = torch.zeros_like(rewards)
        for prompt, places in rows.items():
            held = self.rewards.setdefault(prompt, deque(maxlen=self.buffer_size))
            held.extend(value for value in rewards[places].tolist() if value == value)
            known = given if len(held) < self.min_count else rewards.new_tensor(list(held))
            if len(known):
                found[places] = (rewards[places] - known.mean()) / (known.std(correction=0) + self.eps)
        return found.nan_to_num(nan=0.0).float()

    def state(self) -> dict[str, list[float]]:
        """As plain data, for a checkpoint."""
        return {prompt: list(held) for prompt, held in self.rewards.items()}

    def load_state(self, state: dict[str, list[float]]) -> None:
        """Go on from what `state` gave."""
        self.rewards = {prompt: deque(held, maxlen=self.buffer_size) for prompt, held in state.items()}
