"""What was asked of the launcher, and what is refused because the run would be another one."""

import os

import pytest
import torch

from shared.errors import UserError
from shared.runtime import launch
from shared.runtime.launch import LaunchRequest

CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: {kind}
use_cpu: {cpu}
num_machines: {machines}
num_processes: {processes}
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [*launch.ENGINES.values(), "ACCELERATE_USE_CPU", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "FSDP_VERSION"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", "/nowhere.yaml")


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The request that follows from an `accelerate launch` with these words, `config` standing for a YAML file."""

    def request(*words, kind="MULTI_GPU", cpu="false", machines=1, processes=2):
        config = tmp_path / "launch.yaml"
        config.write_text(CONFIG.format(kind=kind, cpu=cpu, machines=machines, processes=processes))
        line = [str(config) if word == "config" else word for word in words]
        monkeypatch.setattr(launch, "launcher_words", lambda: [*line, "train.py", "--num_processes", "9", "--cpu"])
        return launch.launch_request()

    return request


def test_the_launchers_words_count_and_the_scripts_do_not(asked):
    assert asked("--multi_gpu", "--num_processes", "3") == LaunchRequest(processes=3)
    assert asked("--cpu", "--num_processes", "2") == LaunchRequest(processes=2, cpu=True)
    assert asked("--use_fsdp", "--num_processes", "2", "--num_machines", "2").engine == "FSDP"
    assert asked("--use_deepspeed").engine == "DEEPSPEED"


def test_a_configuration_file_counts_where_the_words_say_nothing(asked):
    file = ("--config_file", "config")
    assert asked(*file, kind="DEEPSPEED", machines=2, processes=4) == LaunchRequest(4, 2, "DEEPSPEED")
    assert asked(*file, "--num_processes", "8", kind="FSDP") == LaunchRequest(8, 1, "FSDP")
    assert asked(*file, kind="MULTI_CPU", cpu="true") == LaunchRequest(2, 1, None, cpu=True)
    assert asked(*file, "--multi_gpu", kind="FSDP").engine is None  # the word replaces the file's engine


def test_without_accelerate_the_environment_counts(monkeypatch):
    monkeypatch.setattr(launch, "launcher_words", lambda: None)
    assert launch.launch_request() == LaunchRequest()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert launch.launch_request() == LaunchRequest(4, None, "DEEPSPEED", cpu=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/usr/bin/python3", "/usr/bin/accelerate", "launch", "--cpu", "a.py"], ["--cpu", "a.py"]),
        (["python", "-m", "accelerate.commands.launch", "a.py"], ["a.py"]),
        (["python3.12", "/bin/accelerate-launch", "a.py"], ["a.py"]),
        (["python", "/usr/bin/accelerate", "env"], None),
        (["python", "train.py"], None),
        (["bash", "accelerate", "launch"], None),
        (["python"], None),
        ([], None),
    ],
)
def test_accelerate_is_known_by_its_command_line(words, expected, monkeypatch):
    class Parent:
        def parent(self):
            return self

        def cmdline(self):
            return words

    monkeypatch.setattr("psutil.Process", Parent)
    assert launch.launcher_words() == expected


def test_as_many_processes_as_asked_for_pass():
    launch.check_processes(1, LaunchRequest())
    launch.check_processes(2, LaunchRequest(processes=2, engine="DEEPSPEED"))


def test_fewer_processes_than_asked_for_are_refused():
    with pytest.raises(UserError, match=r"asked for 2 process\(es\), but 1 train.*multi_cpu.yaml.*Nothing was"):
        launch.check_processes(1, LaunchRequest(processes=2))
    # pdsh starts one process on each machine, and each of them trains alone
    with pytest.raises(UserError, match=r"asked for 4 process\(es\) on 2 machines.*multinode_launcher: standard"):
        launch.check_processes(2, LaunchRequest(processes=4, machines=2, engine="DEEPSPEED"))


def test_another_engine_than_asked_for_is_refused(monkeypatch):
    launch.check_engine("FSDP", LaunchRequest(engine="FSDP"))
    launch.check_engine("MULTI_CPU", LaunchRequest())
    with pytest.raises(UserError, match="asked for FSDP, but the engine in use is MULTI_CPU.*profiles"):
        launch.check_engine("MULTI_CPU", LaunchRequest(engine="FSDP"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match="asked for DEEPSPEED, but the engine in use is CPU"):
        launch.check_processes(1, LaunchRequest(processes=1, engine="DEEPSPEED"))


def test_every_process_needs_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    launch.check_devices(use_cpu=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    launch.check_devices(use_cpu=True)
    with pytest.raises(UserError, match=r"3 processes .* shows 2 GPU.*--num_processes 2.*--use_cpu"):
        launch.check_devices(use_cpu=False)


def test_the_cores_are_shared_between_the_processes_here(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    try:
        for processes, threads in ((1, 6), (2, 3), (9, 1)):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
            launch.prepare_cpu()
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def group(monkeypatch):
    """accelerate's state as after a launch of this type."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    state = {}
    monkeypatch.setattr(PartialState, "_shared_state", state)
    return lambda kind: state.update(distributed_type=DistributedType[kind]) or state


def test_fsdp2_runs_on_the_processor_and_fsdp1_does_not(group, monkeypatch):
    state = group("MULTI_CPU")
    launch.shard_on_cpu()
    assert state["distributed_type"] == "MULTI_CPU"  # nobody asked for sharding
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP version 1 .*cannot be resumed.*fsdp2.yaml"):
        launch.shard_on_cpu()
    monkeypatch.setenv("FSDP_VERSION", "2")
    launch.shard_on_cpu()
    assert state["distributed_type"] == "MULTI_GPU"


def test_fsdp1_is_free_to_run_on_gpus(group, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    state = group("MULTI_GPU")
    launch.shard_on_cpu()
    assert state["distributed_type"] == "MULTI_GPU"


def test_what_the_user_has_set_is_kept(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    launch.quiet_libraries()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
