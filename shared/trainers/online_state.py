"""What an online trainer adds to a checkpoint: the round under way, the place among the prompts, random states.

With it a run goes on in the middle of a round as if it had not stopped. Each process writes its own file. Of the
prompts only the rows' numbers are kept: the data set has them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from shared.errors import UserError
from shared.trainers.rollout import Buffer, row_number

if TYPE_CHECKING:
    from shared.trainers.online import OnlineTrainer

FILE = "online-{rank}.pt"
SHAPE = ("num_generations", "per_device_train_batch_size", "steps_per_generation")  # say whose rows are whose
KEPT = ("lengths", "truncated", "logp", "rewards", "total", "advantages", "old", "ref", "correction", "columns")


@dataclass
class Place:
    """Where a run is: remembered while a step's micro-batches are drawn, so that a draw that fails is repeated whole.

    Args:
        prompts: prompts drawn.
        buffer, cursor: the round under way, and the micro-batches that were handed out of it.
        random: state of the sampler's generator.
        noted: how many of each figure were noted.
        controllers: what the trainer's `controllers` gave.
    """

    prompts: int
    buffer: Buffer | None
    cursor: int
    random: Tensor
    noted: dict[str, int]
    controllers: dict[str, Any]

    @classmethod
    def of(cls, trainer: OnlineTrainer) -> Self:
        """Where the trainer is now."""
        buffer = trainer.buffer
        return cls(
            trainer.prompts.cursor,
            buffer,
            0 if buffer is None else buffer.cursor,
            trainer.random.get_state(),
            {name: len(values) for name, values in trainer._noted.items()},
            trainer.controllers(),
        )


def save_state(trainer: OnlineTrainer, checkpoint: Path) -> None:
    """Write this process's part: as things are, or were before the draw that is under way."""
    place = trainer.begun or Place.of(trainer)
    buffer = place.buffer
    state: dict[str, Any] = {
        "processes": trainer.args.world_size,
        "shape": {name: getattr(trainer.args, name) for name in SHAPE},
        "prompts": place.prompts,
        "random": place.random,
        "controllers": place.controllers,
        "alarms": trainer.alarms.state(),
        "noted": {name: trainer._noted[name][:count] for name, count in place.noted.items()},
        "sums": {name: (float(total), float(trainer._counts[name])) for name, total in trainer._sums.items()},
    }
    if buffer is not None and not replace(buffer, cursor=place.cursor).spent:
        rollout = buffer.rollout
        state["buffer"] = {
            "cut": buffer.cut,
            "iterations": buffer.iterations,
            "born": buffer.born,
            "cursor": place.cursor,
            "actions": trainer.actor.state(rollout),
            "rows": [row_number(sample) for sample in rollout.samples[:: rollout.group_size]],
            "group_size": rollout.group_size,
            **{name: getattr(rollout, name) for name in KEPT},
        }
    torch.save(state, checkpoint / FILE.format(rank=trainer.args.process_index))


def load_state(trainer: OnlineTrainer, checkpoint: Path) -> None:
    """Take it back.

    Where the number of processes or a round's shape is another one, or a process has no file, a new round is sampled,
    from the same place among the prompts.

    Raises:
        UserError: the checkpoint has none, or its rows are not those of the data set.
    """
    args = trainer.args
    own, first = (checkpoint / FILE.format(rank=rank) for rank in (args.process_index, 0))
    path = own if own.is_file() else first
    if not path.is_file():
        raise UserError(f"{checkpoint} was not written by an online trainer: it has no {path.name}.")
    state = torch.load(path, weights_only=True)
    trainer.prompts.cursor = state["prompts"]
    trainer.last_epoch = state["prompts"] / len(trainer.prompts.rows)
    trainer.alarms.load_state(state["alarms"])
    trainer.load_controllers(state["controllers"])
    if state["processes"] != args.world_size:
        return
    # a round is of all processes or of none: each one has its rows in its own file
    lacking = torch.tensor(float(not own.is_file()), device=args.device)
    if trainer.accelerator.reduce(lacking, "sum") > 0:
        _tell(trainer, "A process has no file of its own in the checkpoint")
        return
    trainer.random.set_state(state["random"])
    trainer._noted = defaultdict(list, state["noted"])
    for name, (total, count) in state["sums"].items():
        trainer.record(name, torch.tensor(total, device=args.device), torch.tensor(count, device=args.device))
    if (kept := state.get("buffer")) is None:
        return
    shape = state["shape"]
    if changed := [f"{name} was {shape[name]}" for name in SHAPE if shape[name] != getattr(args, name)]:
        _tell(trainer, ", ".join(changed))
        return
    trainer.buffer = _restored(trainer, kept, checkpoint)


def _tell(trainer: OnlineTrainer, why: str) -> None:
    if trainer.args.should_log:
        print(f"{why}: the round under way is left, and a new one sampled.", flush=True)


def _restored(trainer: OnlineTrainer, kept: dict[str, Any], checkpoint: Path) -> Buffer:
    data = trainer.train_dataset
    known = {row: at for at, row in enumerate(range(len(data)) if data.kept is None else data.kept)}
    if missing := [row for row in kept["rows"] if row not in known]:
        raise UserError(f"{checkpoint}: row {missing[0]} is not in the data set. Resume with the data of the run.")
    rows = trainer.prompts.at([known[row] for row in kept["rows"]])
    rollout = trainer.actor.restored(kept["actions"], rows, kept["group_size"])
    for name in KEPT:
        setattr(rollout, name, kept[name])
    return Buffer(rollout, kept["cut"], kept["iterations"], kept["born"], kept["cursor"])
