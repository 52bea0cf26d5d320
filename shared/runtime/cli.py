"""The program `trialign`: trains with `trialign NAME`, lists its commands with `trialign --help`.

Options are read here before anything is started, so a misspelt one costs a second and one line. Nothing heavy is
imported until a run begins.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from shared.errors import UserError
from shared.runtime.commands import COMMANDS, command

TOOLS = {
    "env": "Show versions and devices, to go with a question or a bug report.",
    "data": "Show how a data set is read: trialign data NAME [--dataset_config …].",
}
USAGE = """\
usage: trialign COMMAND [--option value ...]

Align text and vision-language models. With no options a command trains a small built-in model on built-in data;
trialign COMMAND --help lists its options.

{commands}

{tools}

  --version     Show the version.
  --help        Show this text."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the program; `argv` are its words, those of this process where None.

    Raises:
        SystemExit: always: 0 after a run that ended well, 2 after a user's error, 130 after an interrupt.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        raise SystemExit(_run(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:  # `trialign dpo --help | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + 13) from None


def _run(words: list[str]) -> int:
    if words and words[0] in ("--version", "-V"):
        import importlib.metadata

        print(f"trialign {importlib.metadata.version('trialign')}")
        return 0
    if not words or words[0] in ("--help", "-h", "help"):
        print(usage())
        return 0 if words else 2
    name, options = split(words)
    if name in TOOLS:
        from shared.runtime import tools

        return getattr(tools, name)(options)
    command(name, TOOLS)
    return _train(name, options)


def usage() -> str:
    """The list of commands."""
    width = max(map(len, (*COMMANDS, *TOOLS))) + 2
    rows = [f"  {name:<{width}}{row.summary}" for name, row in COMMANDS.items()]
    tools = [f"  {name:<{width}}{summary}" for name, summary in TOOLS.items()]
    return USAGE.format(commands="\n".join(rows), tools="\n".join(tools))


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command's name, and its options; launcher options may stand before the name.

    Raises:
        UserError: another option stands before the name, or there is no name.
    """
    from shared.runtime.launcher import LaunchOptions
    from shared.runtime.options import class_options

    early = ("config", *class_options(LaunchOptions))
    rest, before = list(words), []
    while rest and rest[0].startswith("-"):
        word, equals, _ = rest[0].partition("=")
        if word.lstrip("-").replace("-", "_") not in early:
            raise UserError(
                f"{word}: must stand behind the command. Write trialign COMMAND {word} … (--help lists all)"
            )
        before += [rest.pop(0)]
        before += [] if equals or not rest else [rest.pop(0)]
    if not rest:
        raise UserError("there is no command. Write trialign COMMAND … (--help lists all)")
    return rest[0], before + rest[1:]


def _train(name: str, words: list[str]) -> int:
    from shared.runtime.command import run_command
    from shared.runtime.launch import LAUNCHED
    from shared.runtime.run import read_options, train

    row, line = COMMANDS[name], None

    def run() -> None:
        nonlocal line
        options, launch = read_options(name, words, prog=f"trialign {name}", description=row.summary)
        if LAUNCHED not in os.environ:
            from shared.runtime.launcher import visible_devices

            line = launch.words(0 if options.values.get("use_cpu") else visible_devices())
        if line is None:
            train(row, options)

    run_command(run)
    if line is None:
        return 0
    from shared.runtime.launcher import start

    return start(line, [name, *words])


if __name__ == "__main__":
    main()
