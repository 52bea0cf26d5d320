"""What scripts/stack_llama.py does: supervised fine-tuning, a reward model, and PPO against it, one after the other.

Each stage is a run of `trialign` of its own, in the folder of them all, with the options of its file; a stage trains
an adapter, and what the next one starts from is that adapter merged into its base. The reward model is left an
adapter: it scores on the policy's own base (`adapter:reward`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.builtin import RECIPES
from shared.errors import UserError
from shared.runtime.launcher import MODULE, ROOT
from shared.runtime.parser import parse_arguments
from shared.runtime.report_text import before_after_table
from textalign.stack_llama_options import STAGES, StackLlamaOptions

COMMANDS = {"sft": "sft", "reward": "reward", "rl": "ppo"}  # stage -> command
MERGED = {"sft": "sft-merged", "rl": "final"}  # stage -> folder of its adapter merged into its base


def main(words: Sequence[str] | None = None, *, description: str | None = None) -> None:
    """Run the stages, and tell what each reached on held-out rows.

    Args:
        words: the options; those of this process where None.
        description: for `--help`.

    Raises:
        UserError: options or files that cannot be used, a stage that failed.
        SystemExit: after `--help`.
    """
    options: StackLlamaOptions = parse_arguments([StackLlamaOptions], words, description=description).build(
        StackLlamaOptions
    )
    recipes = Path(options.recipes or RECIPES / "stack_llama").resolve()
    stages = [name for name in STAGES if name in options.stages]
    for name in stages:
        if not (recipes / f"{name}.yaml").is_file():
            raise UserError(f"recipes {options.recipes}: there is no {name}.yaml in this folder.")
    folder = Path(options.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in stages:
        run_stage(name, recipes / f"{name}.yaml", folder)
    print(told(folder), flush=True)


def run_stage(name: str, recipe: Path, folder: Path) -> None:
    """Train a stage in the folder, and merge its adapter.

    Args:
        name: of the stage; its output_dir, in the folder, is called so too.
        recipe: the file with its options.
        folder: of all stages.

    Raises:
        UserError: it failed, and has said why.
    """
    command = [COMMANDS[name], "--config", str(recipe)]
    print(f"\n=== {name}: trialign {shlex.join(command)} (in {folder})", flush=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-m", MODULE, *command], cwd=folder, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        rest = " ".join(STAGES[STAGES.index(name) :])
        raise UserError(f"The stage {name} failed, see above. Go on from it with --stages {rest}.")
    if name in MERGED and (folder / name / "adapter_config.json").is_file():
        from shared.runtime.adapters import merge_adapter

        with contextlib.chdir(folder):  # the adapter's base may be named from there
            merge_adapter(name, MERGED[name])
        print(f"Merged into its base: {folder / MERGED[name]}", flush=True)


def told(folder: Path) -> str:
    """What the finished stages reached on held-out rows, by their reports: a table of each."""
    tables = []
    for stage in STAGES:
        report = folder / stage / "report" / "report.json"
        if report.is_file():
            held = json.loads(report.read_text(encoding="utf-8"))
            before, after = held["before"], held["after"]
            if not after:  # no answers were compared: the first evaluation and the last
                curves = {name: curve["value"] for name, curve in held["curves"].items() if name.startswith("eval_")}
                before, after = ({name[5:]: values[at] for name, values in curves.items()} for at in (0, -1))
            tables.append(before_after_table(before, after, title=f"{stage}, on held-out rows"))
    return "\n\n".join(["", *tables])
