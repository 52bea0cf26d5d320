"""Two processes that share out the model see videos, images and text by turns, and train what one process trains."""

import json
from pathlib import Path

import pytest
from launching import PYTHON, profile, run

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("video_worker.py")


def launched(folder, *launch):
    done = run(*launch, WORKER, folder, timeout=400)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((folder / "facts.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("alone"), *PYTHON)


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_processes_that_see_different_kinds_go_on_together(engine, alone, tmp_path):
    together = launched(tmp_path, *profile(engine))
    assert len(alone["losses"]) == 4
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert together["answers"] == alone["answers"]
