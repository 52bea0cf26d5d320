"""One step of each sampler: against densities by hand, diffusers, and the recorded steps of trl's DDPO."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch.distributions import Normal, kl_divergence

from diffusionalign.schedules import Schedule, schedule_of
from diffusionalign.steps import FLOOR, Sampler, kl
from shared.errors import UserError

RECORD = json.loads((Path(__file__).parent.parent / "oracles" / "trl-0.23.1-diffusion.json").read_text())
VP = Schedule("epsilon", torch.tensor([2, 1]), torch.tensor([0.6, 0.8, 1.0]), torch.tensor([0.8, 0.6, 0.0]))
FLOW = Schedule("flow", torch.tensor([800.0, 500.0]), torch.tensor([0.2, 0.5, 1.0]), torch.tensor([0.8, 0.5, 0.0]))
SAMPLERS = {
    "ddim": (VP, Sampler("ddim")),
    "sde": (FLOW, Sampler("sde")),
    "cps": (FLOW, Sampler("cps")),
    "cps-vp": (VP, Sampler("cps")),
}


def rows(*values):
    """Rows of two elements each."""
    return torch.tensor(values).view(-1, 1, 1, 2)


AT0 = torch.tensor([0])
X, P, NEXT = rows([1.0, -0.5]), rows([0.25, 0.5]), rows([0.9, -0.3])


# ---- By hand --------------------------------------------------------------------------------------------------------


def expected(name):
    """Mean and standard deviation of the step from level 0 to 1, in the words of each paper."""
    x, p = X, P
    if name == "ddim":
        alpha, after, eta = 0.36, 0.64, 1.0
        clean = (x - math.sqrt(1 - alpha) * p) / math.sqrt(alpha)
        std = eta * math.sqrt((1 - after) / (1 - alpha) * (1 - alpha / after))
        return math.sqrt(after) * clean + math.sqrt(1 - after - std**2) * p, std
    if name == "sde":
        t, dt = 0.8, 0.5 - 0.8
        rate = 0.7 * math.sqrt(t / (1 - t))
        mean = x * (1 + rate**2 * dt / (2 * t)) + p * (1 + rate**2 * (1 - t) / (2 * t)) * dt
        return mean, rate * math.sqrt(-dt)
    if name == "cps":
        t, after = 0.8, 0.5
        std = after * math.sin(0.8 * math.pi / 2)
        return (1 - after) * (x - t * p) + math.sqrt(after**2 - std**2) * (x + (1 - t) * p), std
    std = 0.6 * math.sin(0.8 * math.pi / 2)
    return 0.8 * (x - 0.8 * p) / 0.6 + math.sqrt(0.36 - std**2) * p, std


@pytest.mark.parametrize("name", SAMPLERS)
def test_mean_and_std_by_hand(name):
    schedule, sampler = SAMPLERS[name]
    mean, std = expected(name)
    step = sampler.step(schedule, AT0, X, P)
    torch.testing.assert_close(step.mean, mean)
    assert step.std.tolist() == pytest.approx([std]) and sampler.stochastic(schedule) == [0]
    assert torch.equal(step.next, step.mean)
    drawn = sampler.step(schedule, AT0, X, P, noise=rows([1.0, -2.0])).next
    torch.testing.assert_close(drawn, mean + std * rows([1.0, -2.0]))


@pytest.mark.parametrize("name", ["ddim", "sde"])
def test_log_probability_is_that_of_a_normal_density(name):
    schedule, sampler = SAMPLERS[name]
    mean, std = expected(name)
    found = sampler.step(schedule, AT0, X, P, next=NEXT).logp
    first, second = ((value - m) ** 2 for value, m in zip((0.9, -0.3), mean.flatten().tolist(), strict=True))
    by_hand = -(first + second) / 2 / (2 * std**2) - math.log(std) - math.log(2 * math.pi) / 2
    assert found.tolist() == pytest.approx([by_hand])
    torch.testing.assert_close(found, Normal(mean, std).log_prob(NEXT).mean((1, 2, 3)))


@pytest.mark.parametrize("name", ["cps", "cps-vp"])
def test_log_probability_of_cps_has_no_constants(name):
    schedule, sampler = SAMPLERS[name]
    mean, _ = expected(name)
    found = sampler.step(schedule, AT0, X, P, next=NEXT).logp
    torch.testing.assert_close(found, -((NEXT - mean) ** 2).mean((1, 2, 3)))


@pytest.mark.parametrize("name", SAMPLERS)
def test_kl_is_that_of_two_normal_densities(name):
    schedule, sampler = SAMPLERS[name]
    step, other = sampler.step(schedule, AT0, X, P), sampler.step(schedule, AT0, X, P + 0.1)
    found = kl(step, other.mean)
    first = kl_divergence(Normal(step.mean, step.std.item()), Normal(other.mean, step.std.item()))
    torch.testing.assert_close(found, first.mean((1, 2, 3)))
    shift = (step.mean - other.mean).flatten().tolist()
    assert found.tolist() == pytest.approx([(shift[0] ** 2 + shift[1] ** 2) / 2 / (2 * step.std.item() ** 2)])
    assert kl(step, step.mean).tolist() == [0.0]


def test_the_rate_at_noise_alone_is_that_of_the_next_level():
    """t / (1 - t) is infinite at t = 1."""
    schedule = Schedule(
        "flow", torch.tensor([1000.0, 500.0]), torch.tensor([0.0, 0.5, 1]), torch.tensor([1.0, 0.5, 0])
    )
    step = Sampler("sde", noise_level=0.5).step(schedule, AT0, X, P)
    rate = 0.5 * math.sqrt(1 / 0.5)
    torch.testing.assert_close(step.mean, X * (1 - rate**2 * 0.5 / 2) - P * 0.5)
    assert step.std.tolist() == pytest.approx([rate * math.sqrt(0.5)])


# ---- Against diffusers and trl --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_ddim_is_that_of_diffusers(prediction, eta):
    scheduler = DDIMScheduler(clip_sample=False, prediction_type=prediction, steps_offset=1, set_alpha_to_one=False)
    schedule, sampler = schedule_of(scheduler, 12), Sampler("ddim", eta=eta)
    scheduler.set_timesteps(12)
    latents, given, noise = (torch.randn(2, 4, 3, 3) for _ in range(3))
    for number in sampler.stochastic(schedule):
        time = scheduler.timesteps[number]
        mean, drawn = (
            scheduler.step(given, time, latents, eta=eta, variance_noise=each).prev_sample
            for each in (torch.zeros_like(noise), noise)
        )
        step = sampler.step(schedule, torch.full((2,), number), latents, given, noise=noise)
        torch.testing.assert_close(step.mean, mean, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(step.next - step.mean, drawn - mean, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("case", RECORD["cases"], ids=lambda case: f"{case['scheduler']}-{case['steps']}")
def test_log_probabilities_are_those_of_trl(case):
    schedule = schedule_of(DDIMScheduler(**{**RECORD["scheduler"], **case["scheduler"]}), case["steps"])
    sampler = Sampler("ddim", eta=case["eta"])
    assert schedule.timesteps.tolist() == case["timesteps"]
    latents, given, noise = (torch.tensor(RECORD[n]).view(RECORD["shape"]) for n in ("latents", "prediction", "noise"))
    acts = sampler.stochastic(schedule)
    assert acts == list(range(case["steps"]))
    for number in acts:
        at = torch.full((len(latents),), number)
        mean = sampler.step(schedule, at, latents, given).mean
        torch.testing.assert_close(mean[0].flatten()[:4], torch.tensor(case["means"][number]), atol=1e-5, rtol=1e-5)
        following = mean + RECORD["noise_scale"] * noise
        logp = sampler.step(schedule, at, latents, given, next=following).logp
        torch.testing.assert_close(logp, torch.tensor(case["logp"][number]), atol=1e-4, rtol=1e-3)


# ---- Rows, steps and number types -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ddim", "cps", "ode", "dpm"])
def test_folded_rows_equal_rows_one_by_one(kind):
    schedule, sampler = schedule_of(DDIMScheduler(clip_sample=False), 10), Sampler(kind)
    at = torch.tensor([7, 0, 9, 7, 3])
    latents, given, following = (torch.randn(5, 4, 3, 3) for _ in range(3))
    folded = sampler.step(schedule, at, latents, given, next=following)
    for row in range(5):
        one = [each[row : row + 1] for each in (at, latents, given)]
        single = sampler.step(schedule, *one, next=following[row : row + 1])
        for name in ("next", "logp", "mean", "std"):
            assert torch.equal(getattr(folded, name)[row : row + 1], getattr(single, name)), name


@pytest.mark.parametrize("storage", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["ddim", "sde", "cps"])
def test_the_log_probability_of_kept_latents_is_exactly_what_it_was(kind, storage):
    flow = kind == "sde"
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3) if flow else DDIMScheduler(clip_sample=False)
    schedule, sampler = schedule_of(scheduler, 10), Sampler(kind)
    latents, given = (torch.randn(64, 4, 8, 8).to(storage) for _ in range(2))
    at = torch.arange(64) % 10
    drawn = sampler.step(schedule, at, latents, given, noise=torch.randn(64, 4, 8, 8), storage=storage)
    assert drawn.next.dtype == storage and drawn.logp.dtype == drawn.mean.dtype == torch.float32
    again = sampler.step(schedule, at, latents, given, next=drawn.next, storage=storage)
    assert torch.equal(drawn.logp, again.logp) and torch.equal(drawn.next, again.next)
    with torch.autocast("cpu", torch.bfloat16):
        cast = sampler.step(schedule, at, latents, given, next=drawn.next, storage=storage)
    assert torch.equal(drawn.logp, cast.logp)


def test_without_rounding_first_the_log_probability_would_differ():
    """What the round trip is for: the density of what was drawn is not that of what is kept."""
    schedule, sampler = SAMPLERS["sde"]
    latents, given, noise = torch.randn(3, 64, 1, 1, 2).unbind()
    at = torch.zeros(64, dtype=torch.long)
    exact = sampler.step(schedule, at, latents, given, noise=noise)
    rounded = sampler.step(schedule, at, latents, given, noise=noise, storage=torch.bfloat16)
    assert not torch.equal(exact.logp, rounded.logp)


def test_steps_without_noise_are_no_actions():
    """The last step ends without noise, whatever the sampler: there is no density to take the log of."""
    last = torch.tensor([1])
    for schedule, sampler in SAMPLERS.values():
        step = sampler.step(schedule, last, X, P, noise=torch.ones_like(X))
        assert sampler.stochastic(schedule) == [0]
        assert step.std.tolist() == step.logp.tolist() == kl(step, X).tolist() == [0.0]
        assert torch.equal(step.next, step.mean)
        plain = Sampler("ode").step(schedule, last, X, P)
        torch.testing.assert_close(step.mean, plain.mean)


def test_a_step_of_hardly_any_noise_is_no_action():
    """Shift 3 at 4 steps leaves .0089 of noise to the last step; a schedule may also end before it is clean."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3)
    assert Sampler("sde").stochastic(schedule_of(scheduler, 4)) == [0, 1, 2]
    ended = Schedule("flow", *(each.clone() for each in (FLOW.timesteps, FLOW.alphas, FLOW.sigmas)))
    ended.sigmas[-1] = 1e-3
    assert Sampler("cps").stochastic(ended) == [0]
    assert Sampler("cps").step(ended, torch.tensor([1]), X, P).std.item() == 0 < 1e-3 < FLOOR
    assert Sampler("ddim", eta=0.0).stochastic(VP) == Sampler("ode").stochastic(VP) == []


@pytest.mark.parametrize("name", SAMPLERS)
def test_gradient_flows_through_the_mean_alone(name):
    schedule, sampler = SAMPLERS[name]
    given = P.clone().requires_grad_()
    step = sampler.step(schedule, AT0, X, given, noise=torch.ones_like(X))
    (drawn,) = torch.autograd.grad(step.logp.sum(), given, retain_graph=True)
    kept = sampler.step(schedule, AT0, X, given, next=step.next.detach())
    (found,) = torch.autograd.grad(kept.logp.sum(), given)
    assert torch.equal(drawn, found) and found.abs().min() > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "euler"}, "sampler='euler': must be one of ddim, sde, cps, ode, dpm"),
        ({"solver": "heun"}, "solver='heun': must be one of ode, dpm"),
        ({"eta": 1.5}, "eta=1.5: must be between 0"),
        ({"kind": "cps", "noise_level": 1.2}, "noise_level=1.2: must be at least 0, and at most 1"),
        ({"kind": "sde", "noise_level": -1}, "noise_level=-1: must be at least 0"),
    ],
)
def test_samplers_that_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        Sampler(**options)


def test_the_flow_sde_needs_flow_matching():
    with pytest.raises(UserError, match="sampler='sde' is for flow matching.*'ddim' or 'cps'"):
        Sampler("sde").stochastic(VP)
