"""Gradients of the sampling chain: against finite differences, where they begin, DRaFT-LV and ReFL by hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from diffusionalign.alignprop_chain import Chain, Truncation
from diffusionalign.sampling import normal
from diffusionalign.schedules import Schedule
from diffusionalign.steps import Sampler
from shared.errors import UserError

STEPS = 4


class Denoiser(nn.Module):
    """Mixes channels by a weight of each step, so that its gradient tells which steps have one."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.4 * torch.randn(STEPS, 2, 2, generator=generator))

    def forward(self, latents, at, pull):
        mixed = torch.einsum("ncd,ndhw->nchw", self.weight[at], latents)
        return torch.tanh(mixed) + pull[:, None, None, None]


class Adapter:
    """Conditioning is a number a row; guidance moves away from the negative one."""

    calls = 0

    def predict(self, model, latents, timesteps, conditioning, *, negative=None, guidance_scale=1.0):
        self.calls += 1
        found = model(latents, timesteps, conditioning)
        if guidance_scale > 1:
            other = model(latents, timesteps, negative)
            found = other + guidance_scale * (found - other)
        return found


def schedule(prediction="epsilon"):
    """Levels of a short chain; the step's own number is its timestep."""
    sigmas = torch.tensor([0.98, 0.8, 0.5, 0.3, 0.0])
    alphas = 1 - sigmas if prediction == "flow" else (1 - sigmas**2).sqrt()
    return Schedule(prediction, torch.arange(STEPS), alphas, sigmas)


def chain(prediction="epsilon", kind="ddim", **options):
    return Chain(Adapter(), schedule(prediction), Sampler(kind, eta=0.5), **options)


def noise(rows=3):
    random = [torch.Generator().manual_seed(i) for i in range(rows)]
    return normal(torch.empty(rows, 2, 3, 3), random), random


CONDITIONING = {"positive": torch.tensor([0.1, -0.2, 0.3])}


def reward(latents):
    return (latents - 0.3 * latents**2).mean((1, 2, 3))


def gradient(made, first, how="truncated", **more):
    """The reward's sum, and its gradient to the weights."""
    model = Denoiser()
    latents, random = noise()
    total = reward(getattr(made, how)(model, latents, first, random, **CONDITIONING, **more)).sum()
    total.backward()
    return total.item(), model.weight.grad


def numeric(made, first, how="truncated", **more):
    """The same by finite differences, of the chain that keeps the latents before `first` as they are."""
    model = Denoiser()
    with torch.no_grad():
        whole = torch.zeros_like(model.weight)
        for at in range(first, STEPS):
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
                found = []
                for move in (1e-2, -2e-2):
                    model.weight[at, i, j] += move
                    latents, random = noise()
                    made_of = getattr(made, how)(model, latents, first, random, **CONDITIONING, **more)
                    found.append(reward(made_of).double().sum())
                model.weight[at, i, j] += 1e-2
                whole[at, i, j] = (found[0] - found[1]) / 2e-2
    return whole


@pytest.mark.parametrize(("prediction", "kind"), [("epsilon", "ddim"), ("v_prediction", "dpm"), ("flow", "cps")])
@pytest.mark.parametrize("first", [0, 2, STEPS - 1])
def test_the_gradient_is_that_of_finite_differences_from_the_first_step_on(prediction, kind, first):
    made = chain(prediction, kind)
    _, found = gradient(made, first)
    assert found[:first].abs().sum() == 0 and (found[first:].abs().amax((1, 2)) > 1e-3).all()
    torch.testing.assert_close(found, numeric(made, first), rtol=2e-2, atol=2e-3)


def test_steps_that_are_computed_again_give_the_same_gradient():
    value, plain = gradient(chain(), 1)
    kept = chain(checkpoint=True)
    again, found = gradient(kept, 1)
    assert again == value and kept.adapter.calls == STEPS + 3, "three steps run twice"
    torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-7)


def test_guidance_has_a_gradient_through_both_predictions():
    made = chain(guidance_scale=3.0)
    more = {"negative": torch.zeros(3)}
    _, found = gradient(made, 2, **more)
    torch.testing.assert_close(found, numeric(made, 2, **more), rtol=2e-2, atol=4e-3)
    assert not torch.allclose(found, gradient(chain(), 2)[1], atol=1e-3)


def test_low_variance_averages_the_last_step_over_noises():
    """By hand: x̂0 = (x - σ ε(x)) / α at the last level, of the image noised again to it."""
    made, model, other = chain(), Denoiser(), Denoiser()
    latents, random = noise()
    found = made.low_variance(model, latents, 2, random, **CONDITIONING)
    assert found.shape == (9, 2, 3, 3)
    reward(found).mean().backward()

    latents, random = noise()
    alpha, sigma, last = made.schedule.alphas[-2], made.schedule.sigmas[-2], torch.full((3,), STEPS - 1)
    final = made.truncated(other, latents, STEPS - 1, random, **CONDITIONING)
    total = reward(final).sum()
    for _ in range(2):
        again = alpha * final.detach() + sigma * normal(final, random)
        clean = (again - sigma * other(again, last, CONDITIONING["positive"])) / alpha
        total = total + reward(clean).sum()
    (total / 9).backward()
    torch.testing.assert_close(model.weight.grad, other.weight.grad)
    assert model.weight.grad[:-1].abs().sum() == 0
    single = gradient(chain(), STEPS - 1)[1] / 3
    assert not torch.allclose(single, model.weight.grad, rtol=1e-2)


def test_one_step_predicts_the_image_from_where_it_is():
    made, model, other = chain(), Denoiser(), Denoiser()
    latents, random = noise()
    reward(made.one_step(model, latents, 2, random, **CONDITIONING)).sum().backward()

    latents, random = noise()
    with torch.no_grad():
        for at in range(2):
            rows = torch.full((3,), at)
            prediction = other(latents, rows, CONDITIONING["positive"])
            latents = made.sampler.step(made.schedule, rows, latents, prediction, noise=normal(latents, random)).next
    alpha, sigma = made.schedule.alphas[2], made.schedule.sigmas[2]
    clean = (latents - sigma * other(latents, torch.full((3,), 2), CONDITIONING["positive"])) / alpha
    reward(clean).sum().backward()
    torch.testing.assert_close(model.weight.grad, other.weight.grad)
    assert (model.weight.grad[[0, 1, 3]] == 0).all() and model.weight.grad[2].abs().sum() > 1e-3
    assert made.adapter.calls == 3, "the steps behind it are not run"


def test_the_first_step_may_predict_at_once():
    made = chain("flow", "ode")
    latents, random = noise()
    made.one_step(Denoiser(), latents, 0, random, **CONDITIONING)
    assert made.adapter.calls == 1


def options(**given):
    plain = {
        "num_inference_steps": 50,
        "backprop_strategy": "gaussian",
        "truncated_backprop_timestep": None,
        "truncated_backprop_std": None,
        "truncated_rand_backprop_minmax": None,
    }
    return SimpleNamespace(**{**plain, **given})


def drawn(count=400, **given):
    random = torch.Generator().manual_seed(3)
    truncation = Truncation.of(options(**given))
    return torch.tensor([truncation.draw(random) for _ in range(count)]).float()


def test_the_first_step_is_drawn_as_the_papers_draw_it():
    steps = drawn()
    assert steps.mean() == pytest.approx(42, abs=1) and steps.std() == pytest.approx(5, abs=1) and steps.max() <= 49
    assert drawn(num_inference_steps=10).mean() == pytest.approx(8.4, abs=0.2)
    steps = drawn(backprop_strategy="uniform", truncated_rand_backprop_minmax=[3, 6])
    assert set(steps.tolist()) == {3, 4, 5, 6}
    steps = drawn(backprop_strategy="refl", num_inference_steps=40)
    assert (steps.min(), steps.max()) == (30, 39)
    assert set(drawn(9, backprop_strategy="fixed", truncated_backprop_timestep=7).tolist()) == {7}
    assert (
        set(drawn(9, backprop_strategy="draft_lv").tolist())
        == {49}
        == set(drawn(9, backprop_strategy="fixed").tolist())
    )
    assert set(drawn(9, backprop_strategy="full").tolist()) == {0}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"truncated_backprop_timestep": 50}, "truncated_backprop_timestep 50: must be a step of the chain, 0 to 49"),
        ({"truncated_rand_backprop_minmax": [0, 50]}, "minmax 0 50: must be two steps of the chain, 0 to 49"),
        ({"truncated_rand_backprop_minmax": [5, 4]}, "the lower one first"),
        ({"truncated_rand_backprop_minmax": [4]}, "must be two steps"),
    ],
)
def test_steps_that_the_chain_does_not_have(given, told):
    with pytest.raises(UserError, match=told):
        Truncation.of(options(**given))
