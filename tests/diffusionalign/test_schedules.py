"""Noise levels read from the schedulers of diffusers, and what a prediction stands for."""

import math

import numpy
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)

from diffusionalign.schedules import Schedule, check_scheduler, schedule_of
from shared.errors import UserError

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def ddim(**options):
    return DDIMScheduler(**{**BETAS, "clip_sample": False, **options})


def test_levels_by_hand():
    """Three training steps with betas .1, .2 and .5: what is left of the picture is .9, .72 and .36."""
    levels = schedule_of(ddim(num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.5]), 3)
    assert levels.timesteps.tolist() == [2, 1, 0] and levels.steps == 3
    assert levels.alphas.tolist() == pytest.approx([0.6, math.sqrt(0.72), math.sqrt(0.9), 1])
    assert levels.sigmas.tolist() == pytest.approx([0.8, math.sqrt(0.28), math.sqrt(0.1), 0])


@pytest.mark.parametrize(
    ("options", "first", "last", "end"),
    [
        ({"timestep_spacing": "leading", "steps_offset": 1}, 901, 1, 0.0),
        ({"timestep_spacing": "leading"}, 900, 0, 0.0),
        ({"timestep_spacing": "trailing"}, 999, 99, 0.0),
        ({"timestep_spacing": "linspace"}, 999, 0, 0.0),
        ({"timestep_spacing": "trailing", "set_alpha_to_one": False}, 999, 99, math.sqrt(0.00085)),
    ],
)
def test_spacing_and_the_last_level(options, first, last, end):
    levels = schedule_of(ddim(**options), 10)
    assert (levels.timesteps[0].item(), levels.timesteps[-1].item()) == (first, last)
    assert levels.sigmas[-1].item() == pytest.approx(end, rel=1e-4)
    assert torch.all(levels.sigmas.diff() <= 0)
    torch.testing.assert_close(levels.alphas.square() + levels.sigmas.square(), torch.ones(11))


def test_other_schedulers_of_the_same_betas_give_the_same_levels():
    spaced = {**BETAS, "timestep_spacing": "leading", "steps_offset": 1}
    known = schedule_of(ddim(steps_offset=1), 7)
    for scheduler in (
        EulerDiscreteScheduler(**spaced),
        DPMSolverMultistepScheduler(**spaced),
        DDPMScheduler(**spaced),
    ):
        found = schedule_of(scheduler, 7)
        assert torch.equal(found.timesteps, known.timesteps) and torch.equal(found.alphas, known.alphas)
    skipping = schedule_of(PNDMScheduler(**spaced, skip_prk_steps=True, set_alpha_to_one=False), 7)
    assert skipping.sigmas[-1].item() == pytest.approx(math.sqrt(0.00085), rel=1e-4)


def test_flow_levels_are_the_shifted_ones():
    """Shift 3 takes t to 3 t / (1 + 2 t)."""
    levels = schedule_of(FlowMatchEulerDiscreteScheduler(shift=3), 4, sigmas=[1, 0.75, 0.5, 0.25])
    assert levels.prediction == "flow"
    assert levels.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert levels.alphas.tolist() == pytest.approx([0, 0.1, 0.25, 0.5, 1])
    assert levels.timesteps.tolist() == pytest.approx([1000, 900, 750, 500])


def test_flow_levels_shifted_by_size():
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    levels = schedule_of(scheduler, 2, mu=1.0, sigmas=[1.0, 0.5])
    assert levels.sigmas.tolist() == pytest.approx([1, math.e / (math.e + 1), 0])
    with pytest.raises(UserError, match="use_dynamic_shifting=True.*Give mu"):
        schedule_of(scheduler, 2)


def test_a_solver_with_flow_levels_is_read_as_flow():
    solver = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2)
    levels = schedule_of(solver, 5)
    assert levels.prediction == "flow" and levels.sigmas[-1] == 0
    solver.set_timesteps(5)
    assert torch.equal(levels.sigmas, solver.sigmas)


def test_the_scheduler_is_left_as_it_is():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3)
    before = scheduler.timesteps.clone()
    schedule_of(scheduler, 4)
    assert torch.equal(scheduler.timesteps, before)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow"])
def test_a_true_prediction_gives_the_picture_and_the_noise(prediction):
    flow = prediction == "flow"
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3) if flow else ddim(prediction_type=prediction)
    levels = schedule_of(scheduler, 6)
    clean, noise = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3)
    at = torch.arange(6)
    alpha, sigma = (level[at].view(-1, 1, 1, 1) for level in (levels.alphas, levels.sigmas))
    given = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "sample": clean, "flow": noise - clean}
    latents = alpha * clean + sigma * noise
    torch.testing.assert_close(levels.noised(clean, at, noise), latents)
    torch.testing.assert_close(levels.clean(latents, at, given[prediction]), clean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(levels.noise(latents, at, given[prediction]), noise, atol=1e-4, rtol=1e-4)


def test_a_schedule_that_starts_from_noise_alone():
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    levels = schedule_of(ddim(**options, prediction_type="v_prediction"), 4)
    assert levels.alphas[0] == 0 and levels.sigmas[0] == 1
    latents, velocity = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    assert torch.equal(levels.clean(latents, torch.zeros(2, dtype=torch.long), velocity), -velocity)
    with pytest.raises(UserError, match="starts from noise alone"):
        schedule_of(ddim(**options), 4)


def test_levels_made_while_sampling_serve_training():
    with torch.inference_mode():
        levels = schedule_of(ddim(), 4)
        levels.clean(torch.randn(1, 2), torch.zeros(1, dtype=torch.long), torch.randn(1, 2))
    prediction = torch.randn(1, 2, requires_grad=True)
    levels.clean(torch.randn(1, 2), torch.zeros(1, dtype=torch.long), prediction).sum().backward()
    assert prediction.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (LCMScheduler(**BETAS), "LCMScheduler, is not supported.*DDIMScheduler.*FlowMatchEulerDiscreteScheduler"),
        (DDIMScheduler(**BETAS), "clip_sample=True.*not for latents.*clip_sample=False"),
        (ddim(thresholding=True), "thresholding=True"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "prediction_type='flow_prediction'"),
        (FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas=True"),
        (object(), "scheduler, object, is not supported"),
    ],
)
def test_schedulers_that_are_refused(scheduler, words):
    with pytest.raises(UserError, match=words):
        check_scheduler(scheduler)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_numbers_of_steps_that_are_refused(steps):
    with pytest.raises(UserError, match=f"num_inference_steps={steps}: must be between 1 and the scheduler's 1000"):
        schedule_of(ddim(), steps)


def test_steps_beyond_the_training_steps_are_refused():
    with pytest.raises(UserError, match="steps_offset=1 goes beyond"):
        schedule_of(ddim(steps_offset=1), 1000)


def test_an_unknown_prediction_is_an_error():
    levels = Schedule("score", torch.tensor([1]), torch.tensor([0.5, 1]), torch.tensor([0.5, 0]))
    with pytest.raises(ValueError, match="prediction 'score'"):
        levels.clean(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), torch.zeros(1, 1))


def test_levels_can_be_given_as_an_array():
    levels = schedule_of(FlowMatchEulerDiscreteScheduler(), 3, sigmas=numpy.linspace(1.0, 1 / 3, 3))
    assert levels.sigmas.tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0])
