"""Diffusion trainers in two processes: they train what one process trains, and all have the same weights."""

import json
from pathlib import Path

import pytest
from diffusion_worker import RUNS, train
from launching import profile, run

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("diffusion_worker.py")


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    done = run(*profile("multi_cpu"), WORKER, folder, *RUNS, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return json.loads((folder / "facts.json").read_text())


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_trains(name, together, tmp_path):
    alone, found = train(name, tmp_path), together[name]
    assert len(found["ranks"]) == 2 and found["ranks"][0] == found["ranks"][1]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4, abs=2e-7)  # near 0 of advantages that cancel
    assert found["weights"] == pytest.approx(alone["weights"], rel=1e-3, abs=1e-7)
    assert found["held_out"] == pytest.approx(alone["held_out"], rel=1e-3, abs=1e-5)
