"""The records that pass between data, policy and objective, and what a policy must be able to do.

Dimension letters: P prompts, G completions a prompt, B = P * G rows, L prompt tokens, T completion tokens.
This file holds no model code: a policy for a modality stands in its own module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

CRITIC = "critic"  # the name of a critic in a policy's model, and that of its adapter; see shared.policies.critic


@dataclass
class GroupedBatch:
    """Rows that share prompts: what every token objective runs on.

    Supervised fine-tuning has no shared prompt: its prompt is empty, `(B, 0)`, and the whole row stands in
    `completion_ids`, with `completion_mask` saying which of its tokens are learnt:

    >>> row = torch.tensor([[5, 6, 7, 2]])
    >>> batch = GroupedBatch.of_rows(row, attention=torch.ones_like(row), mask=torch.tensor([[0, 0, 1, 1]]))
    >>> batch.rows, batch.counted_tokens().item()
    (1, 2)

    Args:
        prompt_ids: `(P, L)` token ids, left-padded.
        prompt_mask: `(P, L)`, 1 at real tokens.
        completion_ids: `(P*G, T)` token ids, right-padded; row i belongs to prompt i // G.
        completion_attention: `(P*G, T)`, 1 at real tokens.
        completion_mask: `(P*G, T)`, 1 where the objective counts the token.
        model_inputs: extras for the model, opaque here (pixel_values, image_grid_thw, token_type_ids, …).
        group_size: G. SFT 1, preference pairs 2, group-relative policy gradients more.
        columns: what the objective needs beside the tokens, by name; the first dimension is P or P*G (labels, margins,
            reference log-probabilities `(P*G, T)`).
        beyond: extra that stands beside the prompts' tokens -> what stands beside the completions' (a token type);
            those that are not named go on as at the prompt's last token.
        alone: makes the same rows with a prompt of its own for each completion, for models that cannot share prompts
            whose extras are not known here (images).
        notes: row number -> what was done to it, for rows that were left out or lost their end. They travel with the
            batch since collators run in processes of their own.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_attention: Tensor
    completion_mask: Tensor
    model_inputs: dict[str, Any] = field(default_factory=dict)
    group_size: int = 1
    columns: dict[str, Tensor] = field(default_factory=dict)
    beyond: dict[str, int] = field(default_factory=dict)
    alone: Callable[[], GroupedBatch] | None = None
    notes: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of_rows(cls, ids: Tensor, *, attention: Tensor, mask: Tensor, model_inputs: dict[str, Any] | None = None):
        """A batch of whole rows `(B, T)` with no shared prompt."""
        empty = ids.new_zeros(ids.shape[0], 0)
        return cls(empty, empty, ids, attention, mask, model_inputs or {})

    @property
    def rows(self) -> int:
        """B, the number of completions."""
        return self.completion_ids.shape[0]

    def member(self, index: int) -> GroupedBatch:
        """The completion `index` of every prompt, as a batch of its own with one completion a prompt."""
        own = slice(index, None, self.group_size)
        columns = {k: v[own] if v.shape[0] == self.rows else v for k, v in self.columns.items()}
        return replace(
            self,
            completion_ids=self.completion_ids[own],
            completion_attention=self.completion_attention[own],
            completion_mask=self.completion_mask[own],
            group_size=1,
            columns=columns,
            alone=None,
        )

    @property
    def action_mask(self) -> Tensor:
        """`(B, T)`, 1 where the objective counts the action: the name under which an online trainer asks for it."""
        return self.completion_mask

    def counted_tokens(self) -> Tensor:
        """Scalar: the tokens that the objective counts."""
        return self.completion_mask.sum()

    def seen(self) -> Tensor:
        """Scalar: the tokens that the model reads beside the prompts."""
        return self.completion_attention.sum()

    def _map(self, function) -> GroupedBatch:
        changed = {f.name: function(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        extras = {k: function(v) if isinstance(v, Tensor) else v for k, v in self.model_inputs.items()}
        columns = {k: function(v) for k, v in self.columns.items()}
        return replace(self, **changed, model_inputs=extras, columns=columns)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> GroupedBatch:
        """The batch on another device. Types stay as they are: the policy casts images to the model's type."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> GroupedBatch:
        """The batch in page-locked memory: called by torch's DataLoader."""
        return self._map(lambda t: t.pin_memory())

    def keys(self) -> Iterator[str]:
        """The names of the tensors that the model sees."""
        return iter(("input_ids", *self.model_inputs))


@dataclass
class LogProbs:
    """Log-probabilities of the actions of a batch.

    Args:
        logp: `(B, T)`, 0 where `mask` is 0.
        mask: `(B, T)`, 1 where the objective counts the action.
        entropy: `(B, T)` of the policy at each counted action, in nats, where asked for.
        correct: `(B, T)` bool, whether the action was the policy's most likely one.
        collision: `(B, T)` log of the chance that two draws of the policy agree, log Σ_v p_v², where asked for.
        values: `(B, T)` what the model's critic says of the state before each action, where asked for.
    """

    logp: Tensor
    mask: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None
    collision: Tensor | None = None
    values: Tensor | None = None


class ActionBatch(Protocol):
    """What an online trainer knows of a batch: B rows of up to T actions, tokens or others. GroupedBatch is one.

    Attributes:
        columns: what the objective needs, by name, `(B,)` or `(B, T)`; the trainer puts its own in.
    """

    columns: dict[str, Tensor]

    @property
    def action_mask(self) -> Tensor:
        """`(B, T)`, 1 where the objective counts the action."""
        ...

    def to(self, device: torch.device | str) -> ActionBatch:
        """The batch on another device."""
        ...


class ActionStats(Protocol):
    """Detached statistics of the N counted actions of a batch, row by row.

    Attributes:
        logp: `(N,)`.
        entropy: `(N,)`, where asked for.
    """

    logp: Tensor
    entropy: Tensor | None


class Policy(Protocol):
    """A modality's side of training: how its model gives log-probabilities."""

    def around(self, model: nn.Module, *, share_prefix: bool = True) -> Policy:
        """The same policy around another model, its reference; itself where it keeps nothing of the model.

        Args:
            model: the reference, frozen.
            share_prefix: of token policies, run each prompt once for its completions.
        """
        ...

    def log_probs(
        self, model: nn.Module, batch: Any, *, entropy: bool = False, entropy_gradient: bool = False
    ) -> LogProbs:
        """Log-probabilities `(B, T)` of the batch's actions, with gradient where the model has it.

        Args:
            model: the model as the engine wraps it.
            batch: a GroupedBatch, or another ActionBatch of the modality's own.
            entropy: also give the policy's entropy at each action.
            entropy_gradient: give the entropy, differentiable as the log-probabilities are.
        """
        ...

    def action_objective(
        self,
        model: nn.Module,
        batch: Any,
        objective: Callable[[Tensor, slice], Tensor],
        *,
        entropy: bool = False,
        entropy_weights: Tensor | None = None,
    ) -> tuple[Tensor, ActionStats]:
        """Sum of an objective that is separable by action, some of the N counted actions at a time.

        Args:
            model: the model as the engine wraps it.
            batch: as of log_probs.
            objective: gets `(n,)` log-probabilities and which of the N actions they are; gives `(n,)` weighted losses.
            entropy: also measure the policy's entropy at the counted actions.
            entropy_weights: `(N,)`: adds `Σ weight · entropy` to the loss, with its gradient.

        Returns:
            The scalar loss, to be differentiated, and the statistics.
        """
        ...
