"""Online DPO, XPO and Nash-MD under the engines: two processes train what one trains, and write with both models."""

import json
from pathlib import Path

import pytest
from launching import PYTHON, profile, run

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("online_preference_worker.py")
COMPARED = ["online_dpo", "xpo", "nash_md", "adapter"]
ENGINES = {"multi_cpu": [*COMPARED, "mixing", "mixing_adapter"], "fsdp2": ["nash_md", "mixing"], "zero3": ["mixing"]}
FIGURES = (
    "losses", "norms", "rewards", "rewards/chosen", "rewards/margins", "objective/kl", "scores/chosen",
    "frac_reward_zero_std",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from tiny import build_lm

    folder = tmp_path_factory.mktemp("models")
    build_lm(folder / "lm")
    return folder


def launched(folder, launch, models, tasks):
    done = run(*launch, WORKER, folder, models, *tasks, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-6000:]
    return json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    return launched(tmp_path_factory.mktemp("alone"), PYTHON, models, COMPARED)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_what_one_trains(engine, models, alone, tmp_path):
    found = launched(tmp_path, profile(engine), models, ENGINES[engine])
    for name in set(found) & set(COMPARED):
        assert len(found[name]["losses"]) == 5 and max(map(abs, alone[name]["losses"])) > 1e-3, name
        assert 0 < sum(alone[name]["frac_reward_zero_std"]) < 5, "some pairs are undecided"
        for figure in FIGURES:
            expected = pytest.approx(alone[name][figure], rel=1e-3, abs=5e-5)
            assert found[name][figure] == expected, (name, figure)
        assert found[name]["ranks agree"], name
    for name in set(found) - set(COMPARED):
        for facts in (found[name], found[name]["of xpo"]):
            assert len(facts["losses"]) == 5 and facts["ranks agree"], name
