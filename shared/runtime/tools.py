"""What `trialign` shows without training: the machine, and how a data set is read."""

from __future__ import annotations

from collections.abc import Sequence

from shared.errors import UserError
from shared.runtime.arguments import DataArguments
from shared.runtime.commands import resolve
from shared.runtime.parser import parse_arguments

SHOWN = 300  # characters of a column


def env(words: Sequence[str]) -> int:
    """Print versions and devices, one a line; nothing that names the machine or its user."""
    if words:
        raise UserError(f"{words[0]}: trialign env takes no options.")
    from shared.runtime.launcher import visible_devices
    from shared.runtime.report import environment

    devices = visible_devices()  # loads torch, without which no GPU is listed
    facts = {**environment(), "devices": devices or "none; training runs on the processor"}
    width = max(map(len, facts)) + 2
    print("\n".join(f"{name:<{width}}{value}" for name, value in facts.items()))
    return 0


def data(words: Sequence[str]) -> int:
    """Print how a data set is read: its kind, columns, counts and first row.

    Raises:
        UserError: it cannot be read.
    """
    names = []
    for word in words:
        if word.startswith("-"):
            break
        names.append(word)
    line = [*(["--dataset_name", *names] if names else []), *words[len(names) :]]
    options = parse_arguments([DataArguments], line, prog="trialign data NAME", description="Show how data are read.")
    given = options.build(DataArguments)
    from shared.runtime.launch import quiet_libraries

    quiet_libraries()
    loaded = resolve("shared.data.loading:load_datasets")(given.dataset_name, seed=0, **given.loading())
    for source in loaded.sources:
        train = "a stream" if source.train_rows is None else f"{source.train_rows:,} rows"
        rows = "a stream" if source.test_rows is None else f"{source.test_rows:,} rows"
        held_out = f"{rows} held out ({source.test_split})" if source.test_split else "none held out"
        adapted = f"; {source.adapted}" if source.adapted else ""
        print(f"{source.name}: {source.where}; {train} to train on, {held_out}{adapted}")
    rows = resolve("shared.data.schema:undecoded")(loaded.train)
    first = next(iter(rows))
    print(f"read as: {resolve('shared.data.schema:detect_kind')(list(first), first)}\nfirst row:")
    for name, value in first.items():
        text = str(value)
        print(f"  {name}: {text[:SHOWN]}{' …' if len(text) > SHOWN else ''}")
    return 0
