"""Whole sampling runs: against diffusers' own loops, and with windows, generators and gradients."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from diffusionalign.sampling import denoise, normal
from diffusionalign.schedules import schedule_of
from diffusionalign.steps import Sampler

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW = FlowMatchEulerDiscreteScheduler(shift=3)


class Denoiser(nn.Module):
    """A linear map of the latents that knows the time."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter((0.3 * torch.randn(4, 4, generator=generator)).to(dtype))
        self.calls = 0

    def forward(self, latents, timesteps):
        self.calls += 1
        scale = (0.5 + 0.5 * torch.cos(timesteps.float() / 400)).view(-1, 1, 1, 1).to(latents.dtype)
        return torch.einsum("ij,njhw->nihw", self.weight, latents) * scale

    def on(self, schedule):
        return lambda latents, at: self(latents, schedule.timesteps[at])


def start(rows=3, dtype=torch.float32):
    return torch.randn(rows, 4, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ---- Against diffusers ----------------------------------------------------------------------------------------------


def ddim(**options):
    return DDIMScheduler(**{**BETAS, "clip_sample": False, **options})


def solver(**options):
    return DPMSolverMultistepScheduler(**{**BETAS, "timestep_spacing": "trailing", **options})


ZERO_SNR = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
RUNS = {
    "ddim": ("ode", ddim(steps_offset=1, set_alpha_to_one=False), 10),
    "ddim-v": ("ode", ddim(prediction_type="v_prediction", timestep_spacing="trailing"), 20),
    "ddim-x0": ("ode", ddim(prediction_type="sample"), 10),
    "ddim-zero-snr": ("ode", ddim(**ZERO_SNR), 10),
    "flow": ("ode", FLOW, 8),
    "dpm": ("dpm", solver(), 10),
    "dpm-long": ("dpm", solver(), 20),
    "dpm-v": ("dpm", solver(prediction_type="v_prediction"), 10),
    "dpm-flow": ("dpm", DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"), 10),
    "dpm-one-step": ("dpm", solver(), 1),
}


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_a_run_is_that_of_diffusers(name):
    kind, scheduler, steps = RUNS[name]
    scheduler, model, latents = copy.deepcopy(scheduler), Denoiser(), start()
    schedule = schedule_of(scheduler, steps)
    scheduler.set_timesteps(steps)
    theirs = latents
    for time in scheduler.timesteps:
        theirs = scheduler.step(model(theirs, time.repeat(3)), time, theirs).prev_sample
    run = denoise(model.on(schedule), latents, schedule, Sampler(kind))
    torch.testing.assert_close(run.final, theirs, atol=1e-3, rtol=1e-4)
    assert model.calls == 2 * steps


# ---- What is kept, and which steps are stochastic -------------------------------------------------------------------


def test_recorded_steps_are_what_happened():
    schedule, sampler, model = schedule_of(FLOW, 6), Sampler("sde"), Denoiser(torch.bfloat16)
    storage = torch.bfloat16
    run = denoise(
        model.on(schedule), start(), schedule, sampler, record=[4, 0, 2], random=seeded(0)[0], storage=storage
    )
    assert run.at.tolist() == [[0, 2, 4]] * 3 and run.logp.shape == (3, 3)
    assert run.before.dtype == run.after.dtype == run.final.dtype == storage
    assert run.before.shape == (3, 3, 4, 5, 5)
    with torch.no_grad():
        for k in range(3):
            given = model.on(schedule)(run.before[:, k], run.at[:, k])
            step = sampler.step(schedule, run.at[:, k], run.before[:, k], given, next=run.after[:, k], storage=storage)
            assert torch.equal(step.logp, run.logp[:, k])
    everything = denoise(
        model.on(schedule), start(), schedule, sampler, record=range(6), random=seeded(0)[0], storage=storage
    )
    assert torch.equal(everything.before[:, 1:], everything.after[:, :-1])
    assert torch.equal(everything.after[:, -1], run.final) and torch.equal(everything.final, run.final)
    assert torch.equal(everything.before[:, 0], start(dtype=storage))


def test_without_recorded_steps_the_grids_are_empty():
    schedule = schedule_of(FLOW, 2)
    run = denoise(Denoiser().on(schedule), start(), schedule, Sampler("ode"))
    assert run.before.shape == run.after.shape == (3, 0, 4, 5, 5)
    assert run.at.shape == run.logp.shape == (3, 0)


@pytest.mark.parametrize("kind", ["ode", "dpm"])
@torch.no_grad()
def test_steps_outside_the_window_are_the_solvers(kind):
    """Before the window a run is the solver's, and after it that of a run which starts where it ended."""
    schedule, model, sampler = schedule_of(FLOW, 8), Denoiser(), Sampler("sde", solver=kind)
    every = range(8)
    plain = denoise(model.on(schedule), start(), schedule, Sampler(kind), record=every)
    run = denoise(
        model.on(schedule), start(), schedule, sampler, record=every, window=range(3, 5), random=seeded(0)[0]
    )
    assert torch.equal(run.after[:, :3], plain.after[:, :3]) and not torch.equal(run.after[:, 3], plain.after[:, 3])
    assert (run.logp != 0).tolist() == [[step in (3, 4) for step in every]] * 3
    rest = [each[5:] for each in (schedule.timesteps, schedule.alphas, schedule.sigmas)]
    shortened = type(schedule)("flow", *rest)
    after = denoise(model.on(shortened), run.after[:, 4], shortened, Sampler(kind))
    torch.testing.assert_close(run.final, after.final)


def ideal(schedule, spread=0.5):
    """The denoiser of pictures whose elements are normal with this spread, for flow matching."""

    def predict(latents, at):
        alpha, sigma = (levels[at].view(-1, 1, 1, 1) for levels in (schedule.alphas, schedule.sigmas))
        return (sigma - alpha * spread**2) * latents / (alpha**2 * spread**2 + sigma**2)

    return predict


@pytest.mark.parametrize(("steps", "better"), [(10, 0.85), (20, 0.35), (40, 0.15)])
def test_the_solver_of_second_order_is_closer_to_the_exact_solution(steps, better):
    """Without a stochastic step in the window; the last step of these levels but one is four times that before it."""
    schedule, latents = schedule_of(FLOW, steps), start()
    first, second = (
        denoise(ideal(schedule), latents, schedule, Sampler("sde", solver=kind), window=()).final - 0.5 * latents
        for kind in ("ode", "dpm")
    )
    assert second.norm() < better * first.norm()


# ---- Generators -----------------------------------------------------------------------------------------------------


def test_noise_of_a_row_depends_on_its_generator_alone():
    schedule = schedule_of(FLOW, 4)
    model, latents = Denoiser(), start()
    together = denoise(model.on(schedule), latents, schedule, Sampler("sde"), random=seeded(5, 6, 7)).final
    alone = denoise(model.on(schedule), latents[1:2], schedule, Sampler("sde"), random=seeded(6)).final
    torch.testing.assert_close(together[1:2], alone)
    assert not torch.allclose(together[0], together[2])


def test_one_generator_draws_for_all_rows():
    like = torch.empty(2, 3, dtype=torch.bfloat16)
    drawn = normal(like, seeded(0)[0])
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, torch.randn(2, 3, generator=seeded(0)[0]))
    assert torch.equal(normal(like, seeded(0, 0))[0], normal(like, seeded(0, 0))[1])
    with pytest.raises(ValueError, match="3 generators for 2 rows"):
        normal(like, seeded(0, 1, 2))


# ---- Gradient -------------------------------------------------------------------------------------------------------


def gradient(sampler, **options):
    schedule, model = schedule_of(FLOW, 4), Denoiser()
    run = denoise(model.on(schedule), start(), schedule, sampler, random=seeded(3)[0], **options)
    run.final.square().mean().backward()
    return run.final, model.weight.grad, model.calls


@pytest.mark.parametrize("sampler", [Sampler("sde"), Sampler("ode"), Sampler("dpm")], ids=lambda each: each.kind)
def test_gradient_by_finite_differences(sampler):
    _, found, _ = gradient(sampler, gradient_from=0)
    schedule, model = schedule_of(FLOW, 4), Denoiser()

    @torch.no_grad()
    def value(change):
        model.weight[1, 2] += change
        run = denoise(model.on(schedule), start(), schedule, sampler, random=seeded(3)[0])
        model.weight[1, 2] -= change
        return run.final.double().square().mean().item()

    assert found[1, 2].item() == pytest.approx((value(1e-2) - value(-1e-2)) / 2e-2, rel=2e-3)


@pytest.mark.parametrize("sampler", [Sampler("sde"), Sampler("dpm")], ids=lambda each: each.kind)
def test_steps_computed_again_give_the_same_gradient(sampler):
    final, found, calls = gradient(sampler, gradient_from=1)
    same, again, more = gradient(sampler, gradient_from=1, checkpoint=True)
    assert torch.equal(final, same) and torch.equal(found, again)
    assert (calls, more) == (4, 7)


def test_no_gradient_before_the_step_from_which_it_flows():
    """Only the last step's prediction depends on the weights then: its part of the gradient can be had alone."""
    _, last, _ = gradient(Sampler("sde"), gradient_from=3)
    _, all_of_it, _ = gradient(Sampler("sde"), gradient_from=0)
    assert not torch.allclose(last, all_of_it)
    schedule, model, sampler = schedule_of(FLOW, 4), Denoiser(), Sampler("sde")
    run = denoise(model.on(schedule), start(), schedule, sampler, record=[3], random=seeded(3)[0])
    at = run.at[:, 0]
    sampler.step(
        schedule, at, run.before[:, 0], model.on(schedule)(run.before[:, 0], at)
    ).next.square().mean().backward()
    torch.testing.assert_close(last, model.weight.grad)


def test_sampling_keeps_no_gradient_unless_asked():
    schedule = schedule_of(FLOW, 2)
    assert not denoise(Denoiser().on(schedule), start(), schedule, Sampler("sde")).final.requires_grad
