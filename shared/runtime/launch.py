"""The machine and the launch: use the device that is there, and refuse to train in another way than was asked for.

Several launches do the wrong thing and still end well: `--cpu --num_processes 2` starts one process, a multi-process
launch without a working process group trains the same model twice into one folder, a sharded engine quietly becomes
plain data parallelism. Here what was asked for (the launcher's command line and its environment) is compared with what
torch.distributed and accelerate made of it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from shared.errors import UserError

Result = TypeVar("Result")
LAUNCHED = "TRIALIGN_LAUNCH"  # the words that `trialign` gave accelerate's launcher, for the processes that it starts
ENGINES = {"DEEPSPEED": "ACCELERATE_USE_DEEPSPEED", "FSDP": "ACCELERATE_USE_FSDP"}


@dataclass(frozen=True)
class LaunchRequest:
    """What the user asked the launcher for; None where nothing was said."""

    processes: int | None = None
    machines: int | None = None
    engine: str | None = None  # "DEEPSPEED", "FSDP" or None
    cpu: bool = False


def quiet_libraries() -> None:
    """Before torch is imported: keep the libraries from printing what a newcomer would take for a fault.

    Waiting threads give the processor back (OMP_WAIT_POLICY): on a busy machine a small model's step is several
    times faster so. Values that the user has set are kept.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Only "no GPU kernel on this machine" comes from these on import.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # "inputs will be cast": by design
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed.elastic.multiprocessing.redirects").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*pin_memory.*no accelerator.*")
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing. is deprecated")  # peft asks transformers
    # peft looks for a built-in model's configuration on the hub when it saves an adapter
    warnings.filterwarnings("ignore", message=r"Could not find a config file in builtin/")
    warnings.filterwarnings("ignore", message=r".*Redirects are currently not supported.*")


def has_accelerator() -> bool:
    """Whether torch sees a GPU or another accelerator here."""
    import torch

    return torch.accelerator.is_available()


def local_processes() -> int:
    """How many processes of this launch run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def prepare_cpu() -> None:
    """On a machine without accelerator: all its cores for the processes here, and no compiler run for DeepSpeed.

    accelerate launch gives each process one thread; DeepSpeed would build a shared-memory all-reduce (a minute, and
    it needs a compiler) before the first step.
    """
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, cores // local_processes()))
    if engine_asked("DEEPSPEED"):
        import deepspeed.comm  # noqa: F401

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def shard_on_cpu() -> None:
    """Let FSDP2 run on gloo: accelerate only considers sharding for a launch that it takes for a GPU one.

    Raises:
        UserError: FSDP1 is asked for on the processor.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    on_cpu = PartialState._shared_state.get("distributed_type") == DistributedType.MULTI_CPU
    if not on_cpu or not engine_asked("FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "FSDP version 1 trains on the processor too, but its checkpoints cannot be resumed. "
            "Use shared/runtime/profiles/fsdp2.yaml, zero3.yaml or multi_cpu.yaml."
        )
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def engine_asked(name: str) -> bool:
    """Whether the launcher set this process up for an engine of ENGINES."""
    return os.environ.get(ENGINES[name], "false").lower() == "true"


def launch_request() -> LaunchRequest:
    """What was asked for, from the `accelerate launch` that started this process and from the environment."""
    engine = next((name for name in ENGINES if engine_asked(name)), None)
    world = int(os.environ["WORLD_SIZE"]) if os.environ.get("WORLD_SIZE") else None
    line = launcher_words()
    cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    if line is None:
        return LaunchRequest(processes=world, engine=engine, cpu=cpu)

    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    args, _ = launch_command_parser().parse_known_args(line)
    defaults = None
    if args.config_file is not None or (os.path.isfile(default_config_file) and not args.cpu):
        defaults = load_config_from_file(args.config_file)
    processes = args.num_processes or getattr(defaults, "num_processes", None) or world
    machines = args.num_machines or getattr(defaults, "num_machines", None)
    if args.use_deepspeed or args.use_fsdp:
        engine = "DEEPSPEED" if args.use_deepspeed else "FSDP"
    elif defaults is not None and not args.multi_gpu:
        asked = str(getattr(defaults.distributed_type, "value", defaults.distributed_type)).upper()
        engine = asked if asked in ENGINES else engine
    cpu = cpu or args.cpu or bool(getattr(defaults, "use_cpu", False))
    return LaunchRequest(processes if processes and processes > 0 else None, machines, engine, cpu)


def launcher_words() -> list[str] | None:
    """The words that the launcher of this process got, be it `trialign` or `accelerate launch`; None without one."""
    return json.loads(os.environ[LAUNCHED]) if LAUNCHED in os.environ else accelerate_words()


def accelerate_words() -> list[str] | None:
    """The words after `accelerate launch` where that is this process's parent, else None."""
    import psutil

    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:  # gone already, or not ours to look at
        return None
    if len(words) < 2 or not os.path.basename(words[0]).lower().startswith("python"):
        return None
    program = os.path.basename(words[1]).lower().removesuffix(".exe")
    if words[1:3] == ["-m", "accelerate.commands.launch"] or (program == "accelerate" and words[2:3] == ["launch"]):
        return words[3:]
    return words[2:] if program == "accelerate-launch" else None


def on_first_process(work: Callable[[], Result]) -> Result:
    """Do work once a launch, and give its result, or the user's error that it raised, to all processes."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState()
    outcome: list[Any] = [None, None]
    if state.is_main_process:
        try:
            outcome[0] = work()
        except UserError as error:
            outcome[1] = error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def check_devices(use_cpu: bool) -> None:
    """Raise UserError when more processes than devices were started here: they would wait for each other for ever."""
    import torch

    if use_cpu or not torch.cuda.is_available():
        return
    processes, devices = local_processes(), torch.cuda.device_count()
    if processes > devices:
        raise UserError(
            f"{processes} processes were started on this machine, which shows {devices} GPU(s): each process needs a "
            f"GPU of its own. Start with --num_processes {devices}, or pass --use_cpu to train on the processor."
        )


def check_processes(processes: int, request: LaunchRequest | None = None) -> None:
    """Raise UserError when not as many processes train together as the launcher was asked for, or cannot as asked.

    Args:
        processes: how many train together, by torch.distributed.
        request: what was asked for; found out where None.
    """
    request = launch_request() if request is None else request
    if request.processes is not None and request.processes != processes:
        machines = f" on {request.machines} machines" if (request.machines or 1) > 1 else ""
        raise UserError(
            f"The launcher was asked for {request.processes} process(es){machines}, but {processes} train(s) "
            "together. On a machine without accelerator use --config_file shared/runtime/profiles/multi_cpu.yaml "
            "(--cpu and MULTI_CPU start one process); with DeepSpeed on several machines set "
            "deepspeed_multinode_launcher: standard. Nothing was trained."
        )
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        check_engine("CPU", request)


def check_engine(engine: str, request: LaunchRequest | None = None) -> None:
    """Raise UserError when the launcher was asked for another engine than the one in use.

    Args:
        engine: accelerate's distributed type: NO, MULTI_GPU, MULTI_CPU, DEEPSPEED, FSDP, …
        request: what was asked for; found out where None.
    """
    request = launch_request() if request is None else request
    if request.engine is not None and request.engine != engine:
        raise UserError(
            f"The launcher was asked for {request.engine}, but the engine in use is {engine}. "
            "Do not combine the engine with --cpu or use_cpu: true, and see shared/runtime/profiles for launches that "
            "work. Nothing was trained."
        )
