"""Starting real launches from tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROFILES = ROOT / "shared" / "runtime" / "profiles"
WORKER = Path(__file__).with_name("worker.py")
PYTHON = (sys.executable,)
ACCELERATE = (sys.executable, "-m", "accelerate.commands.launch")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def environment() -> dict[str, str]:
    """As a user's shell, and one thread a process."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(("ACCELERATE_", "FSDP_", "DS_", "TORCHELASTIC_"))
    }
    # torch finds no GPU, so that these tests are the same everywhere
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def profile(name: str) -> tuple[str, ...]:
    """The launch of a profile of the suite, on any free port."""
    return (*ACCELERATE, "--config_file", str(PROFILES / f"{name}.yaml"), "--main_process_port", "0")


def run(*words: str | Path, timeout: int = 300) -> subprocess.CompletedProcess:
    """Run to the end; what was printed is in `stdout` and `stderr`."""
    return subprocess.run(
        [str(word) for word in words], capture_output=True, text=True, timeout=timeout, env=environment(), check=False
    )


def start(*words: str | Path) -> subprocess.Popen:
    """Start as a group of processes of its own, with all that is printed in one pipe."""
    return subprocess.Popen(
        [str(word) for word in words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        start_new_session=True,
    )
