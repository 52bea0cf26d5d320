"""Runs of the real script that are killed or asked to stop end where an undisturbed run ends."""

import contextlib
import os
import re
import shlex
import signal
import time
from pathlib import Path

import pytest
import torch
from launching import PYTHON, ROOT, profile, run, start
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "scripts" / "sft_vlm.py"
SLOW = Path(__file__).with_name("slow.py")
STEPS = 12
OPTIONS = (
    "--model_name_or_path builtin/vlm-small --dataset_name builtin/shapes --max_train_rows 64 --max_eval_rows 4 "
    f"--learning_rate 1e-3 --max_steps {STEPS} --save_steps 3 --logging_steps 3 --save_total_limit none "
    "--eval_answers 0"
).split()
ALONE = ("--per_device_train_batch_size", "8")
SHARED = ("--per_device_train_batch_size", "4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(*PYTHON, SCRIPT, *OPTIONS, *ALONE, "--output_dir", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "model.safetensors")


def wait_for(path: Path, running, seconds: float = 120.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert running.poll() is None, running.stdout.read()[-3000:]
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


def ended(running) -> str:
    try:
        return running.communicate(timeout=120)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)


def same(folder: Path, whole) -> bool:
    found = load_file(folder / "model.safetensors")
    return found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


def advice(printed: str) -> list[str]:
    """The options that the message says to add."""
    return shlex.split(re.search(r"Go on with: (.*?) \(", printed)[1])


def steps_seen(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def test_killed_interrupted_terminated_and_still_the_same_weights(whole, tmp_path):
    command = [SCRIPT, *OPTIONS, *ALONE]
    folder = ["--output_dir", tmp_path]
    # killed between the weights and the optimizer of the second checkpoint
    running = start(*PYTHON, SLOW, "0", "3", *command, *folder)
    wait_for(tmp_path / "checkpoint-6" / "model.safetensors", running)
    running.kill()
    ended(running)
    assert (tmp_path / "checkpoint-3" / "complete.json").exists()
    assert not (tmp_path / "checkpoint-6" / "complete.json").exists()

    running = start(*PYTHON, SLOW, "0.3", "0", *command, *folder, "--resume_from_checkpoint")
    wait_for(tmp_path / "checkpoint-6" / "complete.json", running)
    running.send_signal(signal.SIGINT)
    printed = ended(running)
    assert running.returncode == 130 and "Traceback" not in printed
    stopped = int(re.search(r"Stopped at step (\d+), saved", printed)[1])
    assert 6 <= stopped < STEPS and (tmp_path / f"checkpoint-{stopped}" / "complete.json").exists()

    running = start(*PYTHON, SLOW, "0.3", "0", *command, *advice(printed))
    wait_for(tmp_path / "checkpoint-9" / "complete.json", running)
    running.send_signal(signal.SIGTERM)
    printed = ended(running)
    assert running.returncode == 143 and "Traceback" not in printed
    assert re.search(r"Stopped at step (\d+), saved", printed)

    done = run(*PYTHON, *command, *advice(printed))
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps_seen(tmp_path)[0] == 3 and steps_seen(tmp_path)[-1] == STEPS
    assert same(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_processes_stop_after_the_same_step_and_resume(number, whole, tmp_path):
    """SIGINT as a terminal sends it, to every process of the group; SIGTERM as a scheduler does, to the launcher."""
    words = [SCRIPT, *OPTIONS, *SHARED, "--output_dir", tmp_path]
    launch = profile("multi_cpu")
    running = start(*launch, SLOW, "0.3", "0", *words)
    wait_for(tmp_path / "checkpoint-3" / "complete.json", running)
    if number == signal.SIGINT:
        os.killpg(running.pid, number)
    else:
        running.send_signal(number)
    printed = ended(running)
    assert running.returncode != 0
    assert len(re.findall(r"Stopped at step \d+, saved", printed)) == 1, printed[-3000:]
    stopped = int(re.search(r"Stopped at step (\d+), saved", printed)[1])
    last = tmp_path / f"checkpoint-{stopped}"
    assert 3 <= stopped < STEPS and (last / "complete.json").exists()
    assert len(list(last.glob("rng_state_*.pth"))) == 2

    if number == signal.SIGTERM:  # once is enough
        done = run(*launch, *words, "--resume_from_checkpoint")
        assert done.returncode == 0, done.stderr[-3000:]
        found = load_file(tmp_path / "model.safetensors")
        apart = torch.cat([(found[name] - whole[name]).flatten().abs() for name in whole])
        assert apart.max() < 1e-2 and apart.quantile(0.99) < 1e-5
