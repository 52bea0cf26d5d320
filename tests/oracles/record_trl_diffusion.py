"""Records the denoising steps of trl's DDPO, for test_steps.py to compare with.

Run it in an environment with the last trl that has DDPOTrainer, e.g.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==0.23.1 diffusers transformers
    /tmp/trl/bin/python tests/oracles/record_trl_diffusion.py

Its `scheduler_step` is called as its trainer calls it: as it samples, without what comes next, and as it trains, with
it. What it draws from is set to 0, so that the first gives the mean of a step. It takes the last step to the first
training step whatever the scheduler says, which is right for the schedulers of Stable Diffusion that are used here.
"""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import torch
import trl
from diffusers import DDIMScheduler
from trl.models import modeling_sd_base

SCHEDULER = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip
SHAPE = (2, 4, 2, 2)
CASES = [
    *({"scheduler": {"prediction_type": name}, "steps": 10, "eta": 1.0}
      for name in ("epsilon", "v_prediction", "sample")),
    {"scheduler": {"prediction_type": "epsilon"}, "steps": 50, "eta": 1.0},
    {"scheduler": {"prediction_type": "epsilon"}, "steps": 20, "eta": 0.6},
    {"scheduler": {"prediction_type": "v_prediction", "beta_schedule": "linear"}, "steps": 5, "eta": 0.9},
]  # fmt: skip


def digits(values):
    """Nine significant digits: float32 is read back as it was."""
    return [digits(value) if isinstance(value, list) else float(f"{value:.9g}") for value in values]


def drawn():
    random = torch.Generator().manual_seed(0)
    return {name: torch.randn(SHAPE, generator=random) for name in ("latents", "prediction", "noise")}


def record(case, given):
    scheduler = DDIMScheduler(**{**SCHEDULER, **case["scheduler"]})
    scheduler.set_timesteps(case["steps"])
    means, logps = [], []
    for time in scheduler.timesteps:
        timestep = time.repeat(SHAPE[0])
        called = (scheduler, given["prediction"], timestep, given["latents"], case["eta"])
        mean = modeling_sd_base.scheduler_step(*called).latents
        following = mean + 0.1 * given["noise"]
        logps.append(modeling_sd_base.scheduler_step(*called, prev_sample=following).log_probs.tolist())
        means.append(mean[0].flatten()[:4].tolist())
    return {**case, "timesteps": scheduler.timesteps.tolist(), "means": digits(means), "logp": digits(logps)}


def main():
    modeling_sd_base.randn_tensor = lambda shape, **_: torch.zeros(shape)
    given = drawn()
    content = {
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "scheduler": SCHEDULER,
        "shape": SHAPE,
        "noise_scale": 0.1,
        **{name: digits(value.flatten().tolist()) for name, value in given.items()},
        "cases": [record(case, given) for case in CASES],
    }
    path = Path(__file__).parent / f"trl-{trl.__version__}-diffusion.json"
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
