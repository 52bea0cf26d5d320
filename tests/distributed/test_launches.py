"""Launches that would train in another way than asked for are refused, or made to work as asked."""

import json
import socket

import pytest
from launching import ACCELERATE, PROFILES, WORKER, run, start

pytestmark = pytest.mark.slow

SCRIPT = """
import sys
from shared.runtime.command import run_command

def main():
    from visionalign import VLMSFTConfig

    VLMSFTConfig(output_dir=sys.argv[1])
    print("started")

run_command(main)
"""
BY_FILE = """
compute_environment: LOCAL_MACHINE
distributed_type: {}
use_cpu: true
num_machines: 1
num_processes: 2
"""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cpu", "--num_processes", "2"], "asked for 2 process(es), but 1 train(s) together"),
        (["--config_file", "MULTI_CPU"], "asked for 2 process(es), but 1 train(s) together"),
        (["--config_file", PROFILES / "zero2.yaml", "--cpu", "--num_processes", "1"], "asked for DEEPSPEED"),
        (["--config_file", PROFILES / "fsdp1.yaml"], "FSDP version 1 trains on the processor too"),
    ],
    ids=["cpu", "MULTI_CPU", "deepspeed-cpu", "fsdp1"],
)
def test_refused(words, message, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "launch.yaml").write_text(BY_FILE.format("MULTI_CPU"))
    words = [tmp_path / "launch.yaml" if word == "MULTI_CPU" else word for word in words]
    done = run(*ACCELERATE, *words, "--main_process_port", "0", script, tmp_path / "out")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert "started" not in done.stdout
    assert not (tmp_path / "out").exists()


def brief(folder):
    facts = json.loads((folder / "facts.json").read_text())["brief"]
    return facts["losses"], facts["world"], facts["engine"]


def test_multi_gpu_with_use_cpu_is_one_training_of_two_processes(alone, tmp_path):
    config = tmp_path / "launch.yaml"
    config.write_text(BY_FILE.format("MULTI_GPU"))
    done = run(*ACCELERATE, "--config_file", config, "--main_process_port", "0", WORKER, tmp_path, "brief")
    assert done.returncode == 0, done.stderr[-3000:]
    assert brief(tmp_path) == (pytest.approx(alone["brief"]["losses"], rel=1e-4), 2, "MULTI_CPU")


def test_two_machines_train_as_one(alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = ("--multi_gpu", "--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1")
    launch = (*ACCELERATE, *common, "--main_process_port", port, "--machine_rank")
    machines = [start(*launch, str(rank), WORKER, tmp_path, "brief") for rank in range(2)]
    printed = [machine.communicate(timeout=200)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], printed
    assert brief(tmp_path) == (pytest.approx(alone["brief"]["losses"], rel=1e-4), 2, "MULTI_CPU")
