"""The text trainers under every engine: two processes train what one process trains."""

import json

import pytest
from launching import PYTHON, profile, run

pytestmark = pytest.mark.slow

WORKER = __file__.replace("test_text_engines", "text_worker")
TRAINERS = ["SFT", "GKD", "DPO", "DPO-adapter", "DPO-cached", "DPO-synced", "ORPO", "KTO", "BCO", "Reward", "PRM"]
SHARDED = ["SFT", "GKD", "DPO", "DPO-adapter", "DPO-cached", "BCO", "Reward"]
ENGINES = {"multi_cpu": TRAINERS, "zero2": ["DPO", "KTO"], "zero3": SHARDED, "fsdp2": SHARDED}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tiny import build_lm

    return build_lm(tmp_path_factory.mktemp("tiny"))


def launched(folder, launch, model, trainers, monkeypatch):
    monkeypatch.setenv("TRIALIGN_CACHE", str(folder / "cache"))
    done = run(*launch, WORKER, folder, model, *trainers, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return launched(tmp_path_factory.mktemp("alone"), PYTHON, model, TRAINERS, patch)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_what_one_trains(engine, alone, model, tmp_path, monkeypatch):
    facts = launched(tmp_path, profile(engine), model, ENGINES[engine], monkeypatch)
    for name, found in facts.items():
        assert len(found["losses"]) == 6
        assert found["losses"] == pytest.approx(alone[name]["losses"], rel=2e-4, abs=1e-5), name
        assert found["held_out"] == pytest.approx(alone[name]["held_out"], rel=1e-3, abs=1e-4), name
