"""How a script ends: a user's error is one line and a status, not a traceback."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from shared.errors import UserError
from shared.runtime.checkpoint import default_output_dir
from shared.runtime.launch import LAUNCHED, accelerate_words, quiet_libraries

USER_ERROR = 2
INTERRUPTED = 130
GRACE = 5.0  # seconds that the other processes leave to the first one to say what is wrong


def defaults_of(
    script: str, recipe: Callable[[Mapping[str, Any]], Path | None]
) -> Callable[[Mapping[str, Any]], Path | None]:
    """Where a script's options come from when they are not given: the run that is resumed, or else the recipe.

    Args:
        script: the script's name, which names the folder of a run that is given none.
        recipe: given options -> a YAML file with defaults, or None.

    Returns:
        What `parse_arguments` takes as `recipe`.
    """

    def find(given: Mapping[str, Any]) -> Path | None:
        resume = given.get("resume_from_checkpoint")
        if resume not in (None, False, "false", "False", ""):
            folder = given.get("output_dir") or default_output_dir(f"runs/{script}", resume)
            if (options := Path(folder) / "run.yaml").is_file():
                return options
        return recipe(given)

    return find


def run_command(main: Callable[[], None]) -> None:
    """Run a script's main function, with the libraries quiet; a UserError ends it with its message and status 2.

    With several processes the first one speaks. Another one speaks only if it is still there after a few seconds: then
    the error is its own (a file that one machine cannot read), and silence would leave the user with no reason at all.

    Raises:
        SystemExit: status 2 after a UserError, 130 after an interrupt. Any other exception passes through.
    """
    quiet_libraries()
    try:
        main()
    except UserError as error:
        _end_with(error)
    except (KeyboardInterrupt, SystemExit) as stopped:
        status = INTERRUPTED if isinstance(stopped, KeyboardInterrupt) else stopped.code
        leave_processes(status if isinstance(status, int) else int(status is not None))
        raise SystemExit(status) from None
    leave_processes(0)


def leave_processes(status: int) -> None:
    """Leave the group of processes; where it is gloo's, end this process here with `status`.

    Gloo's threads outlive the group, and now and then abort a process that is done while the interpreter shuts down:
    the launcher would take a run that has saved all it should for one that failed. Nothing is left to do by then.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    gloo = "gloo" in torch.distributed.get_backend()
    torch.distributed.destroy_process_group()
    if gloo:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _end_with(error: UserError) -> NoReturn:
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher ends this process when the first one has failed
        time.sleep(GRACE)
    print(f"error: {error}" if rank == 0 else f"error (process {rank}): {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    _end_launcher()
    raise SystemExit(USER_ERROR) from None


def _end_launcher() -> None:
    """End a single-process `accelerate launch` above this process before it prints a traceback of its own.

    It answers any failure of the script with a CalledProcessError and some 30 lines, which bury the message, and its
    `--quiet` can only be set by the user beforehand. It has nothing left to do but wait for this process, so a SIGTERM
    loses nothing; its status is then 128 + 15. The launchers of several processes are left alone: they clean up; and
    so is `trialign`, which answers with the status alone.
    """
    if LAUNCHED in os.environ or "TORCHELASTIC_RUN_ID" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1":
        return
    import psutil

    if accelerate_words() is not None:
        with contextlib.suppress(psutil.Error):  # gone already
            psutil.Process().parent().terminate()
