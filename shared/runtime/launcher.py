"""`trialign NAME` on several processes: accelerate's launcher, run in this process and given the words that it needs.

One process needs no launcher: the command then runs where it is. What the launcher is asked for stands in the
environment of the processes that it starts, where `shared.runtime.launch` compares it with what they became.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from shared.errors import UserError
from shared.runtime.launch import LAUNCHED, quiet_libraries
from shared.runtime.options import closest, option

PROFILES = Path(__file__).with_name("profiles")
ROOT = Path(__file__).parents[2]
MODULE = "shared.runtime.cli"  # what each process runs
TOLD = (2, 130, 143)  # statuses of a process that has said itself why it ended


@dataclass
class LaunchOptions:
    """Launch, for trialign NAME: before or behind the command's name, or in its YAML file.

    Raises:
        UserError: options that exclude each other, or lack another.
    """

    num_processes: int | None = option(
        None, "Processes in all. Unset: what accelerate_config says, one for each GPU here, or one without GPU."
    )
    accelerate_config: str | None = option(
        None,
        "How to launch: single_gpu, multi_gpu, multi_cpu, zero1, zero2, zero3, zero3_offload, fsdp1, fsdp2 or a file.",
    )
    config_file: str | None = option(None, "A file of `accelerate config`, as accelerate itself takes it.")
    num_machines: int | None = option(None, "Machines that train together; the command is started on each of them.")
    machine_rank: int | None = option(None, "Number of this machine, from 0.")
    main_process_ip: str | None = option(None, "Address of machine 0.")
    main_process_port: int | None = option(None, "Port on machine 0. Unset: on one machine any free one.")

    def __post_init__(self) -> None:
        if self.accelerate_config and self.config_file:
            raise UserError("accelerate_config and config_file say the same: give one of them.")
        for name, least in (("num_processes", 1), ("num_machines", 1), ("machine_rank", 0), ("main_process_port", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{name} {value}: must be at least {least}.")
        machines = self.num_machines or 1
        if machines > 1 and self.named_file() is None:
            for name in ("machine_rank", "main_process_ip", "main_process_port"):
                if getattr(self, name) is None:
                    raise UserError(f"num_machines {machines}: {name} is missing.")
        if (self.num_processes or machines) % machines:
            raise UserError(
                f"num_processes {self.num_processes}: not a multiple of num_machines {machines}. It counts the "
                "processes of all machines."
            )

    def named_file(self) -> Path | None:
        """The accelerate configuration that is asked for.

        Raises:
            UserError: it does not exist.
        """
        if self.config_file is not None:
            return _existing(self.config_file, f"config_file {self.config_file}: no such file.")
        if self.accelerate_config is None:
            return None
        profiles = sorted(path.stem for path in PROFILES.glob("*.yaml"))
        if self.accelerate_config in profiles:
            return PROFILES / f"{self.accelerate_config}.yaml"
        meant = closest(self.accelerate_config, profiles)
        hint = f" Did you mean {meant}?" if meant else ""
        known = ", ".join(profiles)
        return _existing(
            self.accelerate_config,
            f"accelerate_config {self.accelerate_config}: neither a file nor one of {known}.{hint}",
        )

    def words(self, devices: int) -> list[str] | None:
        """The options of `accelerate launch`; None where this process can run the command itself.

        Args:
            devices: how many GPUs this machine shows; 0 to train on the processor.
        """
        file, machines = self.named_file(), self.num_machines or 1
        here = max(devices, 1)
        processes = self.num_processes
        if file is None:
            processes = here * machines if processes is None else processes
            if processes == 1:
                return None
            file = PROFILES / ("multi_gpu.yaml" if devices else "multi_cpu.yaml")
        elif file.parent == PROFILES:
            if file.stem == "single_gpu" and processes in (None, 1) and machines == 1:
                return None
            if processes is None and devices:
                processes = here * machines  # the number in a profile is an example
        port = self.main_process_port
        if port is None and machines == 1 and file.parent == PROFILES:
            port = 0
        given = {
            "config_file": str(file),
            "num_processes": processes,
            "num_machines": self.num_machines,
            "machine_rank": self.machine_rank,
            "main_process_ip": self.main_process_ip,
            "main_process_port": port,
        }
        return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def _existing(path: str, otherwise: str) -> Path:
    if not Path(path).is_file():
        raise UserError(otherwise)
    return Path(path).resolve()


def visible_devices() -> int:
    """How many GPUs, or accelerators of another kind, torch shows here. Imports torch, which every launch does."""
    quiet_libraries()
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def start(words: Sequence[str], command: Sequence[str]) -> int:
    """Run a command on the processes that accelerate starts, to their end.

    Args:
        words: options of `accelerate launch`.
        command: the command's name and its options.

    Returns:
        The status of the process that ended first with a fault, 128 + the signal that stopped the launch, or 0.

    Raises:
        UserError: accelerate cannot launch so.
    """
    quiet_libraries()
    from subprocess import CalledProcessError

    import torch.distributed.run  # noqa: F401 - sets the level of its loggers when it is imported
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # what they say of a process that failed is said below, in a line
    for name in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    line = [*words, "--module", MODULE, *command]
    os.environ[LAUNCHED] = json.dumps(line)
    if Path.cwd() != ROOT:
        os.environ["PYTHONSAFEPATH"] = "1"  # a folder or file here must not pass for a module of that name
    args = launch_command_parser().parse_args(line)
    before = [(number, signal.signal(number, _pass_on)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        launch_command(args)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        return _status(failure.exitcode, f"process {rank}")
    except CalledProcessError as failed:
        return _status(failed.returncode, "the process")
    except SignalException as stopped:
        return 128 + stopped.sigval
    except (ValueError, AssertionError, ConnectionError) as error:  # accelerate's checks of its configuration
        raise UserError(f"accelerate cannot launch so: {error}") from error
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    """The process that trains decides when to stop; this one waits for it."""
    import psutil

    for child in psutil.Process().children():
        child.send_signal(number)


def _status(code: int, who: str) -> int:
    if code in TOLD:
        return code
    if code < 0:
        name = signal.Signals(-code).name
        hint = " The machine may have run out of memory." if -code == signal.SIGKILL else ""
        print(f"error: {who} was ended by {name}.{hint}", file=sys.stderr, flush=True)
        return 128 - code
    print(f"error: {who} ended with status {code}; the reason stands above.", file=sys.stderr, flush=True)
    return code
