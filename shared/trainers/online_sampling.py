"""The samples of a round with their rewards, which look at them afterwards or while the next ones are taken.

And dynamic sampling: other prompts in the place of groups that teach nothing.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from shared.rewards.combine import RewardTable, joined_tables
from shared.trainers.rollout import Rollout, joined_extras

if TYPE_CHECKING:
    from shared.trainers.online import OnlineTrainer


def scored(trainer: OnlineTrainer, rows: list[dict[str, Any]], group_size: int) -> tuple[Rollout, RewardTable]:
    """Samples of some prompts, then their rewards."""
    with trainer.acting() as model:
        rollout = trainer.actor.act(model, rows, group_size, random=trainer.random)
    with trainer.timed("rewards"):
        return rollout, trainer.score(rollout)


def scored_beside(trainer: OnlineTrainer, rows: list[dict[str, Any]], group_size: int) -> tuple[Rollout, RewardTable]:
    """The same, some prompts at a time: their samples are scored, in order, while those of the next are taken."""
    args = trainer.args
    at_once = max(1, (args.generation_rows or args.per_device_train_batch_size) // group_size)
    rollouts, tables = [], []
    with ThreadPoolExecutor(1, thread_name_prefix="rewards") as scorer:
        with trainer.acting() as model:
            for start in range(0, len(rows), at_once):
                if any(each.done() and each.exception() for each in tables):
                    break  # and is told below
                own = rows[start : start + at_once]
                rollouts.append(trainer.actor.act(model, own, group_size, random=trainer.random))
                tables.append(scorer.submit(trainer.score, rollouts[-1]))
        with trainer.timed("rewards"):  # what is left of them
            table = joined_tables([each.result() for each in tables])
    return trainer.actor.join(rollouts, [range(each.rows) for each in rollouts]), table


def resampled(trainer: OnlineTrainer, rollout: Rollout) -> Rollout:
    """A round with other prompts in the place of groups that teach nothing, as far as they are found."""
    args = trainer.args
    size, world, rank = args.num_generations, args.world_size, args.process_index
    groups = rollout.rows // size
    parts, good = [rollout], [trainer.informative(rollout).tolist()]
    rounds = 0
    while rounds < args.max_resampling:
        missing = torch.tensor(max(0, groups - sum(map(sum, good))), device=args.device)
        if world > 1:
            torch.distributed.all_reduce(missing, torch.distributed.ReduceOp.MAX)
        if (most := int(missing)) == 0:
            break
        trainer.first_number = (trainer.prompts.cursor + rank * most) * size
        drawn = trainer.prompts.draw(most * world)
        parts.append(trainer.sampled(drawn[rank * most : (rank + 1) * most], size))
        good.append(trainer.informative(parts[-1]).tolist())
        rounds += 1
    trainer._noted["dynamic_sampling/rounds"].append(rounds)
    places = [(part, group) for part, kept in enumerate(good) for group, keep in enumerate(kept) if keep]
    idle = [(0, group) for group, keep in enumerate(good[0]) if not keep]
    chosen = sorted([*places, *idle][:groups])
    rows = [
        [row for part, group in chosen if part == at for row in range(group * size, (group + 1) * size)]
        for at in range(len(parts))
    ]
    joined = trainer.actor.join(parts, rows)
    joined.rewards = torch.cat([part.rewards[kept] for part, kept in zip(parts, rows, strict=True)])
    joined.extras = joined_extras(parts, rows)
    joined.total = torch.cat([part.total[kept] for part, kept in zip(parts, rows, strict=True)])
    return joined
