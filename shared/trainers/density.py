"""BCO's density ratio: bad rows count by how likely their prompts are among the good rows' prompts.

Where good and bad answers were gathered for different prompts, a classifier could tell them apart by their prompts
alone. Underlying distribution matching weights each bad row by p / (1 − p), with p the probability, by logistic
regression on embedded prompts, that the prompt is a good row's (Jung et al. 2024, arXiv:2404.04656, section 3.3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object
from torch import Tensor

from shared.errors import UserError
from shared.objectives.unpaired import fit_logistic


class DensityRatio:
    """Weights of bad rows by their prompts. All processes call its methods together, with the same rows.

    Args:
        embedding_func: `f(input_ids=(N, L), attention_mask=(N, L)) -> (N, D)`, the embedded prompts.
        embedding_tokenizer: makes its inputs of texts.
        accelerator: of the trainer; each process embeds a share of the prompts.
        prompt_sample_size: prompts of each kind, at most, that the regression is fitted to.
        min_density_ratio, max_density_ratio: bounds of the weights.
        batch_size: prompts embedded at a time.
        seed: of the sample.

    Raises:
        UserError: numbers that cannot be meant.
    """

    def __init__(
        self,
        embedding_func: Callable[..., Tensor],
        embedding_tokenizer: Any,
        *,
        accelerator: Accelerator,
        prompt_sample_size: int = 1024,
        min_density_ratio: float = 0.5,
        max_density_ratio: float = 10.0,
        batch_size: int = 32,
        seed: int = 0,
    ):
        if prompt_sample_size < 1:
            raise UserError(f"prompt_sample_size is {prompt_sample_size}: must be at least 1.")
        if not 0 <= min_density_ratio <= max_density_ratio:
            raise UserError(
                f"min_density_ratio is {min_density_ratio} and max_density_ratio {max_density_ratio}: the first must "
                "be at least 0 and at most the second."
            )
        self.embedding_func, self.tokenizer, self.accelerator = embedding_func, embedding_tokenizer, accelerator
        self.sample_size, self.batch_size, self.seed = prompt_sample_size, batch_size, seed
        self.bounds = (min_density_ratio, max_density_ratio)
        self.weight: Tensor | None = None  # (D,) of the logistic regression
        self.bias: Tensor | None = None  # scalar

    def fit(self, prompts: Sequence[str], desirable: Sequence[bool] | np.ndarray) -> None:
        """Fit the regression to equally many prompts of either kind, so that p / (1 − p) is the ratio of densities.

        Args:
            prompts: `N` texts.
            desirable: `(N,)`, whether each one's answer is good.

        Raises:
            UserError: rows of one kind only.
        """
        good = np.asarray(desirable, dtype=bool)
        kinds = [np.flatnonzero(good), np.flatnonzero(~good)]
        count = min(self.sample_size, *map(len, kinds))
        if count == 0:
            raise UserError("The density ratio needs good rows and bad rows, and all rows have the same label.")
        draw = np.random.default_rng(self.seed)
        chosen = np.concatenate([np.sort(draw.choice(kind, count, replace=False)) for kind in kinds])
        features = torch.stack(self._shared([prompts[at] for at in chosen], self._embed))
        labels = torch.cat([torch.ones(count), torch.zeros(count)])
        weight, bias = fit_logistic(features, labels)
        # processes on unlike machines may differ in the last digit
        device = self.accelerator.device
        self.weight = broadcast(weight.float().to(device)).cpu()
        self.bias = broadcast(bias.float().to(device)).cpu()

    def weights(self, prompts: Sequence[str], desirable: Sequence[bool] | np.ndarray) -> np.ndarray:
        """`(N,)` float32: what each row counts. Good rows count 1.

        Args:
            prompts: `N` texts.
            desirable: `(N,)`, whether each one's answer is good.
        """
        good = np.asarray(desirable, dtype=bool)
        found = np.ones(len(good), dtype=np.float32)
        bad = [prompts[at] for at in np.flatnonzero(~good)]
        if bad:
            each = sorted(set(bad))  # a prompt has often several answers
            ratio = dict(zip(each, torch.stack(self._shared(each, self._ratios)).tolist(), strict=True))
            found[~good] = [ratio[prompt] for prompt in bad]
        return found

    def _ratios(self, prompts: Sequence[str]) -> Tensor:
        assert self.weight is not None, "fit the density ratio first"
        logit = self._embed(prompts) @ self.weight + self.bias
        return logit.exp().clamp(*self.bounds)  # p / (1 − p) of p = σ(logit)

    @torch.no_grad()
    def _embed(self, prompts: Sequence[str]) -> Tensor:
        """`(N, D)` float32, on the processor."""
        encoded = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        encoded = encoded.to(self.accelerator.device)
        found = self.embedding_func(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"])
        if found.ndim != 2 or len(found) != len(prompts):
            raise UserError(
                f"embedding_func gave {tuple(found.shape)} for {len(prompts)} prompts: must give one vector a prompt, "
                f"({len(prompts)}, D)."
            )
        return found.float().cpu()

    def _shared(self, prompts: Sequence[str], work: Callable[[Sequence[str]], Tensor]) -> list[Tensor]:
        """One result a prompt, in order, each process doing its share in equally many batches."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        count = -(-len(prompts) // processes)
        mine = [prompts[(at * processes + rank) % len(prompts)] for at in range(count)]
        parts = [work(mine[start : start + self.batch_size]) for start in range(0, count, self.batch_size)]
        shares = gather_object([torch.cat(parts)])
        return [shares[at % processes][at // processes] for at in range(len(prompts))]
