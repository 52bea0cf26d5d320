"""Offloaded activations give the gradients that they give where they stay; weights are not moved."""

import contextlib

import pytest
import torch
from tiny_text import build_causal
from torch import nn

from shared.policies.base import GroupedBatch
from shared.policies.token import TokenPolicy
from shared.runtime.offloading import ActivationOffloading


class Everywhere(ActivationOffloading):
    """Copies from the processor's memory to the processor's memory, for lack of another."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.sent = []

    def _is_elsewhere(self, tensor):
        return True

    def _send(self, tensor):
        self.sent.append(tensor.untyped_storage().data_ptr())
        return super()._send(tensor)


@pytest.fixture
def batch():
    ids = torch.randint(3, 340, (4, 24), generator=torch.Generator().manual_seed(0))
    return GroupedBatch.of_rows(ids, attention=torch.ones_like(ids), mask=torch.ones_like(ids))


def gradients(model, batch, offloading):
    model.zero_grad()
    with offloading():
        loss, _ = TokenPolicy(model).action_objective(model, batch, lambda logp, at: -logp / 90)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["whole", "adapter", "checkpointing", "reentrant"])
def test_gradients_are_the_same_and_weights_stay(kind, batch):
    model = build_causal("llama").train()
    if kind == "adapter":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False))
    if kind in ("checkpointing", "reentrant"):
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": kind == "reentrant"})
    expected = gradients(model, batch, contextlib.nullcontext)
    offloading = Everywhere(model, least_bytes=64)
    found = gradients(model, batch, offloading)
    assert offloading.sent and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not weights & set(offloading.sent)


def test_what_is_saved_twice_is_copied_once():
    model = nn.ModuleList([nn.Linear(64, 64) for _ in range(3)])
    offloading = Everywhere(model)
    hidden = torch.randn(32, 64, requires_grad=True) * 2
    with offloading():
        loss = sum(layer(hidden).sum() for layer in model)
    assert len(offloading.sent) == 1
    loss.backward()


def test_what_is_changed_between_two_uses_is_copied_twice():
    model = nn.Linear(64, 64)
    values = torch.randn(32, 64)
    offloading = Everywhere(model)
    with offloading():
        first = model(values)
        values.mul_(2)
        loss = (first + model(values)).sum()
    loss.backward()  # without copies autograd refuses this: a tensor that it needs was changed
    torch.testing.assert_close(model.weight.grad, (1.5 * values.sum(0)).expand(64, 64))


def test_on_a_processor_nothing_is_copied(batch):
    model = build_causal("llama")
    offloading = ActivationOffloading(model)
    gradients(model, batch, offloading)
    assert offloading.copied == 0


def test_memory_that_is_used_again_is_not_taken_for_what_was_there():
    model = nn.Linear(64, 64)
    offloading = Everywhere(model)
    losses = []
    with offloading():
        for value in (1.0, 2.0, 3.0):
            losses.append(model(torch.full((32, 64), value)).sum())  # the input's memory is free after the copy
    sum(losses).backward()
    torch.testing.assert_close(model.weight.grad, torch.full((64, 64), 32 * 6.0))
