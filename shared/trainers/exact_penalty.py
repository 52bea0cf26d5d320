"""The divergence of a policy from its reference at each token, over the whole vocabulary, in bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from shared.objectives.distillation import Head, head_jsd, jsd
from shared.policies.base import GroupedBatch
from shared.policies.prefix import evaluating, is_sharded

if TYPE_CHECKING:
    from shared.trainers.policy_gradient import PolicyGradientTrainer


class _Found(NamedTuple):
    values: Tensor  # (N,)


@torch.no_grad()
def exact_penalty(trainer: PolicyGradientTrainer, batch: GroupedBatch) -> Tensor:
    """`Σ_v π(v) (log π(v) - log ref(v))` at each counted token, `(B, T)`; 0 where the mask is 0.

    Args:
        trainer: of token policies, with a reference; its model as it is.
        batch: rows, on the model's device.
    """
    reference, policy, model = trainer.reference, trainer.policy, trainer.model_wrapped
    kept: list[Head | Tensor] = []
    nothing = torch.zeros((), device=batch.completion_ids.device)

    def keep(head: Head | Tensor) -> tuple[Tensor]:
        if isinstance(head, Head) and is_sharded(own):  # gathered for this call alone
            head = Head(*(part.clone() if isinstance(part, Tensor) else part for part in head))
        kept.append(head)
        return (nothing,)

    def apart(head: Head | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(head, Head):
            return nothing, head_jsd(head, kept[-1], beta=1.0)
        return nothing, jsd(head, kept[-1], beta=1.0, temperature=policy.transform.temperature)

    with reference.running(model) as own:
        reference.policy.at_head(own, batch, keep, tuple)
    with evaluating(trainer.model):
        _, found = policy.at_head(model, batch, apart, _Found)
    mask = batch.action_mask.bool()
    return torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, found.values.float())
