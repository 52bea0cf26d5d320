"""VLM DPO under the engines: two processes train what one process trains."""

import json

import pytest
from launching import PYTHON, profile, run

pytestmark = pytest.mark.slow

WORKER = __file__.replace("test_preference_engines", "preference_worker")
RUNS = ["plain", "adapter", "cached", "images", "images-cached"]
ENGINES = {"multi_cpu": RUNS, "zero2": ["images"], "zero3": RUNS, "fsdp2": RUNS}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tiny import build_vlm

    return build_vlm("llava", tmp_path_factory.mktemp("tiny"))


def launched(folder, launch, model, runs, monkeypatch):
    monkeypatch.setenv("TRIALIGN_CACHE", str(folder / "cache"))
    done = run(*launch, WORKER, folder, model, *runs, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return launched(tmp_path_factory.mktemp("alone"), PYTHON, model, RUNS, patch)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_what_one_trains(engine, alone, model, tmp_path, monkeypatch):
    facts = launched(tmp_path, profile(engine), model, ENGINES[engine], monkeypatch)
    for name, found in facts.items():
        assert len(found["losses"]) == 4
        assert found["losses"] == pytest.approx(alone[name]["losses"], rel=1e-3, abs=1e-5), name
        assert found["held_out"] == pytest.approx(alone[name]["held_out"], rel=1e-3, abs=1e-3), name
