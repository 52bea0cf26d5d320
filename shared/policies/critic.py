"""Critics: what the states of a policy are worth, said by a module that stands in the policy's own model.

There an engine's hooks, device and optimizer reach it, and one call of the wrapped model gives log-probabilities and
values (see shared.policies.token). It is no part of what the model is saved as. Three kinds:

- `Critic`: a head on the policy's last states. The body runs once, and the value loss trains it too.
- `SeparateCritic`: a model with a score head of its own.
- `AdapterCritic`: a head on the states of the policy's body under another adapter than the policy's.

The value of an action is read at the state in which it is taken, which is the one that predicts it. Heads run in the
type that they are held in, outside of autocast, as those of score models do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.policies.base import CRITIC
from shared.policies.prefix import PrefixSharing
from shared.policies.score import head_of, inner_model

States = Callable[[nn.Module], Tensor]


class Critic(nn.Module):
    """A head on the policy's own last states; at first every value is 0.

    Args:
        width: H, of the states.
    """

    kind = "shared"

    def __init__(self, width: int):
        super().__init__()
        self.head = nn.Linear(width, 1)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.bias.zero_()

    def forward(self, states: States, body: nn.Module, hidden: Tensor | None) -> Tensor:
        """The values `(N,)` float32 of some states.

        Args:
            states: gives the states `(N, H)` of a body.
            body: the policy's.
            hidden: its states, where they are known already.
        """
        return scored(self.head, states(body) if hidden is None else hidden)


class SeparateCritic(nn.Module):
    """A model of its own that scores every state, of any width.

    Args:
        model: a transformers model for sequence classification with one label, or a PEFT model around one.

    Raises:
        UserError: its scores are no linear function of its last states.
    """

    kind = "separate"

    def __init__(self, model: nn.Module):
        super().__init__()
        inner = inner_model(model)
        head, body = head_of(model), getattr(inner, inner.base_model_prefix, None)
        if head is None or body in (None, inner) or hasattr(body, "pooler") or inner.config.num_labels != 1:
            raise UserError(
                f"The value model is a {type(inner).__name__}, which gives no value of each token: give a "
                "ForSequenceClassification model of a decoder with one label, or the name of a language model."
            )
        self.model = model

    @property
    def body(self) -> nn.Module:
        """Its part below the head."""
        inner = inner_model(self.model)
        return getattr(inner, inner.base_model_prefix)

    def forward(self, states: States, body: nn.Module, hidden: Tensor | None) -> Tensor:
        """As of Critic."""
        return scored(head_of(self.model), states(self.body))


class AdapterCritic(Critic):
    """A head on the states of the policy's body under the critic's adapter; at first every value is 0.

    Args:
        width: as of Critic.
        running: has the policy run with that adapter for a while.
    """

    kind = "adapter"

    def __init__(self, width: int, running: Callable[[], AbstractContextManager[None]]):
        super().__init__(width)
        self.running = running

    def forward(self, states: States, body: nn.Module, hidden: Tensor | None) -> Tensor:
        """As of Critic."""
        with self.running():
            return scored(self.head, states(body))


def scored(head: nn.Module, hidden: Tensor) -> Tensor:
    """A head's one score of each state, `(N,)` float32."""
    *_, weight = head.parameters()  # where an adapter trains a copy of the head: the copy's
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(weight.dtype)).squeeze(1).float()


def critic_of(model: nn.Module) -> nn.Module | None:
    """The critic in a policy's model; None where it has none."""
    return getattr(inner_model(model), CRITIC, None)


def attach_critic(model: nn.Module, critic: nn.Module, sharing: PrefixSharing) -> None:
    """Put a critic into a policy's model, as a part that is trained with it and not saved with it.

    Args:
        model: transformers' or PEFT's, not yet wrapped by an engine. One critic takes the place of another.
        critic: of one of the kinds here; it is moved to the model's device.
        sharing: the policy's, which has to hold for the critic's body too.
    """
    inner = inner_model(model)
    inner.add_module(CRITIC, critic.to(next(inner.parameters()).device).train(inner.training))
    own = {f"{CRITIC}.{name}" for name in critic.state_dict()}
    inner._keys_to_ignore_on_save = {*(inner._keys_to_ignore_on_save or ()), *own}
    inner.register_load_state_dict_post_hook(_not_missing)
    if isinstance(critic, SeparateCritic):
        sharing.beside(inner_model(critic.model), critic.body)


def detach_critic(model: nn.Module) -> None:
    """Take the critic out of a policy's model, where it has one: it may have been trained before."""
    inner = inner_model(model)
    if critic_of(model) is not None:
        delattr(inner, CRITIC)
    if CRITIC in getattr(model, "peft_config", {}):
        model.delete_adapter(CRITIC)


def _not_missing(module: nn.Module, keys: Any) -> None:
    """A file of the model's weights has none of the critic's."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if f"{CRITIC}." not in name]
