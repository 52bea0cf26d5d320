"""How a script ends: status, message and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.errors import DataError
from shared.runtime import command

SCRIPT = """
from shared.errors import UserError
from shared.runtime.command import run_command

def main():
    raise UserError("--beat: unknown option. Did you mean --beta?")

run_command(main)
"""


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def refuse():
    raise DataError("row 3: no image")


def test_a_users_error_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as ended:
        command.run_command(refuse)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: row 3: no image\n"


def test_another_process_speaks_late_and_says_which_it_is(capsys, monkeypatch):
    waited = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(command.time, "sleep", waited.append)
    with pytest.raises(SystemExit) as ended:
        command.run_command(refuse)
    assert ended.value.code == 2
    assert waited == [command.GRACE]
    assert capsys.readouterr().err == "error (process 3): row 3: no image\n"


def test_an_interrupt_ends_with_130_and_nothing_else(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        command.run_command(interrupted)
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""


def test_any_other_exception_passes_through():
    with pytest.raises(ZeroDivisionError):
        command.run_command(lambda: 1 / 0)


def launched(tmp_path: Path, *launcher: str) -> subprocess.CompletedProcess:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(command.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *launcher, str(script)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)


def test_a_shell_or_another_python_above_is_left_alone(tmp_path):
    parent = "import subprocess, sys; print(subprocess.run([sys.executable, sys.argv[1]]).returncode)"
    done = launched(tmp_path, "-c", parent)
    assert (done.returncode, done.stdout) == (0, "2\n")


ONE_PROCESS = ("--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")


@pytest.mark.slow
@pytest.mark.parametrize("program", ["accelerate", "accelerate-launch"])
def test_accelerate_launch_adds_no_traceback(tmp_path, program):
    path = Path(sys.executable).with_name(program)
    launch = (str(path), "launch") if program == "accelerate" else (str(path),)
    done = launched(tmp_path, *launch, *ONE_PROCESS)
    assert done.stderr == "error: --beat: unknown option. Did you mean --beta?\n"
    assert done.returncode != 0


@pytest.mark.slow
def test_with_several_processes_the_message_comes_once(tmp_path):
    path = Path(sys.executable).with_name("accelerate")
    several = ("--multi_gpu", "--num_processes=2", *ONE_PROCESS[1:], "--main_process_port=0")
    done = launched(tmp_path, str(path), "launch", *several)
    assert done.stderr.count("Did you mean --beta?") == 1
    assert done.stderr.count("error: --beat") == 1
    assert done.returncode != 0
