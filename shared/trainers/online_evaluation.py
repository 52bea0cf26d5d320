"""Held-out prompts sampled from and rewarded, and samples put into tables for the report and the terminal."""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from shared.data.rows import PADDING, Rows
from shared.errors import DataError
from shared.objectives.advantages import pass_at_k, weighted_rewards
from shared.runtime.report import RolloutRow, RolloutTable, SampleRow, rollout_text
from shared.trainers.answers import SAMPLES_SHOWN
from shared.trainers.rollout import Rollout

if TYPE_CHECKING:
    from shared.trainers.online import OnlineTrainer

logger = logging.getLogger(__name__)


def evaluated(trainer: OnlineTrainer, loader: DataLoader) -> tuple[dict[str, float], int]:
    """Figures of samples of all prompts of a loader, over all processes; and how many prompts there are."""
    args, device = trainer.args, trainer.args.device
    size = args.num_generations_eval or args.num_generations
    random = torch.Generator(device).manual_seed(args.seed * 65_537 + args.process_index)
    facts = []
    for rows in loader:
        rows = _usable(trainer, rows)
        rollout = trainer.actor.act(trainer.model, rows, size, random=random, mode="eval")
        values = trainer.score(rollout, "eval").values
        real = torch.tensor([not row.get(PADDING) for row in rows]).repeat_interleave(size)
        more = [weighted_rewards(values, trainer.rewards.weights), rollout.lengths, rollout.truncated, real]
        facts.append(torch.cat([values.float(), torch.stack([fact.float() for fact in more], 1)], 1))
        trainer.control = trainer.callback_handler.on_prediction_step(args, trainer.state, trainer.control)
    found = trainer.accelerator.gather(torch.cat(facts).to(device)).cpu()
    found = found[found[:, -1] > 0]
    if not len(found):
        raise DataError("No held-out prompt can be used: all are left out.")
    return _figures(trainer, found[:, :-4], *found[:, -4:-1].unbind(1), size), len(found) // size


def _figures(
    trainer: OnlineTrainer, values: Tensor, total: Tensor, lengths: Tensor, truncated: Tensor, size: int
) -> dict[str, float]:
    passed = (total >= trainer.args.pass_reward).view(-1, size)
    figures = {
        "reward": total.nanmean(),
        "completions/mean_length": lengths.mean(),
        "completions/clipped_ratio": truncated.mean(),
        **{f"pass@{k}": pass_at_k(passed, k) for k in sorted({1, size})},
    }
    figures |= {f"rewards/{name}/mean": values[:, at].nanmean() for at, name in enumerate(trainer.rewards.names)}
    return {name: float(value) for name, value in figures.items()}


def answered(trainer: OnlineTrainer, rows: Rows) -> tuple[dict[str, float], list[SampleRow]]:
    """Rewards of the most likely answers to some prompts, all and by the rows' column `kind`; and samples."""
    args, names = trainer.args, trainer.rewards.names
    share = rows.share(args.process_index, args.world_size)
    found: list[tuple[int, str, list[float]]] = []
    size = args.per_device_eval_batch_size
    for start in range(0, len(share), size):
        part = _usable(trainer, [share[at] for at in range(start, min(start + size, len(share)))])
        rollout = trainer.actor.act(trainer.model, part, 1, random=None, mode="greedy")
        values = trainer.score(rollout, "greedy").values.tolist()
        for i, (sample, given) in enumerate(zip(rollout.samples, values, strict=True)):
            if not part[i].get(PADDING):
                at = (start + i) * args.world_size + args.process_index
                found.append((at, trainer.actor.shown(sample)[2], given))
    found = sorted(gather_object(found) if args.world_size > 1 else found)
    whole = [rows[at] for at, *_ in found]
    figures = _by_kind(whole, [values for *_, values in found], names, trainer.rewards.weights)
    every = max(1, len(found) // SAMPLES_SHOWN)
    shown = [(row, text, values) for row, (_, text, values) in zip(whole, found, strict=True)][::every]
    return figures, [_sample(trainer, *each) for each in shown[:SAMPLES_SHOWN]]


def _usable(trainer: OnlineTrainer, rows: list[dict]) -> list[dict]:
    """Held-out rows, and marked ones, of which nothing is counted, in the place of those that are to be skipped."""
    if trainer.args.on_bad_row != "skip":
        return rows
    found, spare = [], None
    for row in rows:
        try:
            trainer.actor.check(row)
        except DataError as error:
            if not row.get(PADDING):
                logger.warning("A held-out row is left out: %s", error)
            spare = spare or {**trainer.prompts.at([0])[0], PADDING: True}
            row = spare
        found.append(row)
    return found


def _by_kind(rows: list[dict], values: list[list[float]], names: list[str], weights: Tensor) -> dict[str, float]:
    """Mean of each reward, over all rows and over those of each kind; and of their weighted sum where it says more."""
    by_name: dict[str, list[float]] = defaultdict(list)
    table = torch.tensor(values).view(len(rows), len(names))
    total = weighted_rewards(table, weights).tolist()
    for row, given, whole in zip(rows, values, total, strict=True):
        if len(names) > 1:
            by_name["reward"].append(whole)
        for name, value in zip(names, given, strict=True):
            by_name[name].append(value)
            if isinstance(row.get("kind"), str):
                by_name[f"{name}/{row['kind']}"].append(value)
    means = {name: torch.tensor(given).nanmean().item() for name, given in by_name.items()}
    return {name: mean for name, mean in means.items() if mean == mean}


def _sample(trainer: OnlineTrainer, row: dict, text: str, values: list[float]) -> SampleRow:
    images, question = trainer.actor.question(row)
    columns = {name: row[name] for name in ("kind",) if name in row}
    scored = zip(trainer.rewards.names, values, strict=True)
    columns |= {f"{name} of the last answer": f"{value:.2f}" for name, value in scored}
    reference = next((row[name] for name in ("solution", "answer") if isinstance(row.get(name), str)), "")
    # a completion may say it in many words: that it is not the reference alone is not wrong
    return SampleRow(images, question, reference, after=text, columns=columns, verbatim=False)


def keep_samples(trainer: OnlineTrainer, rollout: Rollout) -> None:
    """A table for the report, of the first round in every `sample_every` steps."""
    args, every, tables = trainer.args, trainer.args.sample_every, trainer.report.rollouts
    if not every or not args.should_save or args.num_completions_to_print == 0:
        return
    if not tables or trainer.state.global_step // every > (tables[-1].step - 1) // every:
        trainer.report.add_rollouts(_table(trainer, rollout, trainer.state.global_step))


def print_samples(trainer: OnlineTrainer, rollout: Rollout) -> None:
    """The first samples of a rollout on the terminal."""
    if trainer.args.num_completions_to_print != 0:
        print(rollout_text(_table(trainer, rollout, trainer.buffer.born)), flush=True)


def _table(trainer: OnlineTrainer, rollout: Rollout, born: int) -> RolloutTable:
    """A rollout's first samples, at the number of the first step that learns from them."""
    rows = []
    for at, sample in enumerate(rollout.samples[: trainer.args.num_completions_to_print]):
        images, prompt, completion = trainer.actor.shown(sample)
        rewards = dict(zip(trainer.rewards.names, rollout.rewards[at].tolist(), strict=True))
        rows.append(
            RolloutRow(
                images=images,
                prompt=prompt,
                completion=completion,
                rewards=rewards,
                reward=float(rollout.total[at]),
                advantage=0.0 if rollout.advantages is None else float(rollout.advantages[at]),
                tokens=int(rollout.lengths[at]),
                finished=not bool(rollout.truncated[at]),
                group=at // rollout.group_size,
                extra={name: _text(values[at]) for name, values in rollout.extras.items()},
            )
        )
    return RolloutTable(born + 1, rows)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
