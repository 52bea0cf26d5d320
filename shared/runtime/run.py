"""One run of a command: its options are read, data and model loaded, the trainer built, trained and saved.

The scripts and `trialign NAME` both come here, so that they differ in nothing but who starts the processes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from shared.builtin import recipe
from shared.errors import UserError
from shared.runtime.command import defaults_of, run_command
from shared.runtime.commands import COMMANDS, Command, resolve
from shared.runtime.launcher import LaunchOptions
from shared.runtime.parser import Parsed, parse_arguments


def run_script(name: str, description: str) -> None:
    """What a script does: run the command in the process that it is in.

    Args:
        name: the command, a key of COMMANDS.
        description: the script's docstring, shown by `--help`.

    Raises:
        SystemExit: as `run_command`.
    """

    def main() -> None:
        options, launch = read_options(name, sys.argv[1:], description=description)
        if launch != LaunchOptions():
            given = [item.name for item in fields(launch) if getattr(launch, item.name) is not None]
            script = Path(sys.argv[0]).name
            raise UserError(
                f"{', '.join(given)}: for the launcher, not for the script. Write it before the script (accelerate "
                f"launch --num_processes 2 {script} …), or use trialign {name} in place of the script."
            )
        train(COMMANDS[name], options)

    run_command(main)


def read_options(
    name: str, words: Sequence[str], *, prog: str | None = None, description: str | None = None
) -> tuple[Parsed, LaunchOptions]:
    """The command's options and the launcher's, by the command line, the YAML file and the recipe. Imports no torch.

    Raises:
        UserError: options that cannot be used.
        SystemExit: after `--help`.
    """
    row = COMMANDS[name]
    groups = [*row.groups, LaunchOptions]
    below = defaults_of(row.stem or row.script, recipe(row.script))
    options = parse_arguments(groups, words, prog=prog, description=description, recipe=below)
    launch = options.build(LaunchOptions)
    for item in fields(LaunchOptions):  # said of this start, not of the run
        options.values.pop(item.name, None)
    for group in groups[:2]:
        options.build(group)  # what they refuse is told before anything is started
    return options, launch


def train(row: Command, options: Parsed) -> None:
    """Load, build, train and save.

    Args:
        row: the command.
        options: what `read_options` gave.

    Raises:
        UserError: options, data or a model that cannot be used.
    """
    model_group, data_group, own = row.groups
    model, data = options.build(model_group), options.build(data_group)

    from shared.runtime.adapters import lora_config
    from shared.runtime.models import model_init_kwargs

    args = options.build(own, resolve(row.config))
    args.check_output_dir()
    args.model_init_kwargs = {**model_init_kwargs(model), **(args.model_init_kwargs or {})}
    rows = resolve("shared.data.loading:load_datasets")(data.dataset_name, seed=args.seed, **data.loading())
    for source in rows.sources if args.should_log else ():
        if source.adapted:
            print(f"data: {source.name}: {source.adapted}", flush=True)
    trainer = resolve(row.trainer)(
        model.model_name_or_path,
        args=args,
        train_dataset=rows.train,
        eval_dataset=rows.test,
        peft_config=model.adapter_name_or_path or lora_config(model),
    )
    trainer.run_options = options.to_yaml()
    trainer.train()
    trainer.save_model()
