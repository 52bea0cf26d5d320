"""What an online trainer adds to a checkpoint: the round under way, the place among the prompts, random states.

With it a run goes on in the middle of a round as if it had not stopped. Each process writes its own file. Of the
prompts only the rows' numbers are kept: the data set has them.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shared.errors import UserError
from shared.trainers.rollout import Buffer, row_number

if TYPE_CHECKING:
    from shared.trainers.online import OnlineTrainer

FILE = "online-{rank}.pt"
KEPT = ("lengths", "truncated", "logp", "rewards", "total", "advantages", "old", "ref", "correction")


def save_state(trainer: OnlineTrainer, checkpoint: Path) -> None:
    """Write this process's part."""
    buffer = trainer.buffer
    state: dict[str, Any] = {
        "processes": trainer.args.world_size,
        "prompts": trainer.prompts.cursor,
        "random": trainer.random.get_state(),
        "controllers": trainer.controllers(),
        "alarms": trainer.alarms.state(),
        "noted": dict(trainer._noted),
    }
    if buffer is not None and not buffer.spent:
        rollout = buffer.rollout
        state["buffer"] = {
            "cut": buffer.cut,
            "iterations": buffer.iterations,
            "born": buffer.born,
            "cursor": buffer.cursor,
            "actions": trainer.actor.state(rollout),
            "rows": [row_number(sample) for sample in rollout.samples[:: rollout.group_size]],
            "group_size": rollout.group_size,
            **{name: getattr(rollout, name) for name in KEPT},
        }
    torch.save(state, checkpoint / FILE.format(rank=trainer.args.process_index))


def load_state(trainer: OnlineTrainer, checkpoint: Path) -> None:
    """Take it back. With another number of processes a new round is sampled, from the same place among the prompts.

    Raises:
        UserError: the checkpoint has none, or its rows are not those of the data set.
    """
    path = checkpoint / FILE.format(rank=trainer.args.process_index)
    path = path if path.is_file() else checkpoint / FILE.format(rank=0)
    if not path.is_file():
        raise UserError(f"{checkpoint} was not written by an online trainer: it has no {path.name}.")
    state = torch.load(path, weights_only=True)
    trainer.prompts.cursor = state["prompts"]
    trainer.last_epoch = state["prompts"] / len(trainer.prompts.rows)
    trainer.alarms.load_state(state["alarms"])
    trainer.load_controllers(state["controllers"])
    if state["processes"] != trainer.args.world_size:
        return
    trainer.random.set_state(state["random"])
    trainer._noted = defaultdict(list, state["noted"])
    if (kept := state.get("buffer")) is None:
        return
    data = trainer.train_dataset
    known = {row: at for at, row in enumerate(range(len(data)) if data.kept is None else data.kept)}
    if missing := [row for row in kept["rows"] if row not in known]:
        raise UserError(f"{checkpoint}: row {missing[0]} is not in the data set. Resume with the data of the run.")
    rows = trainer.prompts.at([known[row] for row in kept["rows"]])
    rollout = trainer.actor.restored(kept["actions"], rows, kept["group_size"])
    for name in KEPT:
        setattr(rollout, name, kept[name])
    trainer.buffer = Buffer(rollout, kept["cut"], kept["iterations"], kept["born"], kept["cursor"])
