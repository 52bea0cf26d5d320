"""Held-out prompts sampled from and rewarded, and samples put into tables for the report and the terminal."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from shared.data.rows import PADDING, Rows
from shared.errors import DataError
from shared.objectives.advantages import pass_at_k, weighted_rewards
from shared.rewards.base import Sample
from shared.rewards.pictures import to_pil
from shared.runtime.report import RolloutRow, RolloutTable, SampleRow, rollout_text
from shared.runtime.report_text import format_number, readable
from shared.runtime.rollout_tables import part_name
from shared.trainers.answers import SAMPLES_SHOWN, in_shares
from shared.trainers.rollout import Rollout
from shared.trainers.trackers import hand_over

if TYPE_CHECKING:
    from shared.trainers.online import OnlineTrainer

logger = logging.getLogger(__name__)

OF_TOKENS = ("completions/mean_length", "completions/clipped_ratio")


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
    figures = {"reward": total.nanmean()}
    if trainer.actor.unit == "token":
        figures |= dict(zip(OF_TOKENS, (lengths.mean(), truncated.mean()), strict=True))
    if trainer.args.pass_reward is not None:
        passed = (total >= trainer.args.pass_reward).view(-1, size)
        figures |= {f"pass@{k}": pass_at_k(passed, k) for k in sorted({1, size})}
    figures |= {f"rewards/{name}/mean": values[:, at].nanmean() for at, name in enumerate(trainer.rewards.names)}
    return {name: float(value) for name, value in figures.items()}


def figure_names(args: Any, rewards: Sequence[str], unit: str) -> list[str]:
    """What an evaluation measures.

    Args:
        args: RolloutOptions.
        rewards: their names.
        unit: of an action; see Actor.
    """
    size = args.num_generations_eval or args.num_generations
    passes = [] if args.pass_reward is None else [f"pass@{k}" for k in sorted({1, size})]
    names = ["reward", *(f"rewards/{reward}/mean" for reward in rewards), *passes]
    return [*names, *OF_TOKENS] if unit == "token" else names


@dataclass(frozen=True)
class Output:
    """The most likely answer to a row's prompt: its text or its pictures, and what each reward gives it."""

    text: str
    images: list[Any]
    values: list[float]


def most_likely(trainer: OnlineTrainer, rows: Rows) -> list[tuple[dict, Output]]:
    """The most likely answers to some prompts, pictures from fixed noise, rewarded; on every process.

    A row that is to be left out has none.
    """

    def asked(batch: list[dict]) -> list[Output | None]:
        part = _usable(trainer, batch)
        rollout = trainer.actor.act(trainer.model, part, 1, random=None, mode="greedy")
        values = trainer.score(rollout, "greedy").values.tolist()
        outputs = [
            Output(trainer.actor.shown(sample)[2], drawn(trainer, sample), given)
            for sample, given in zip(rollout.samples, values, strict=True)
        ]
        return [None if row.get(PADDING) else output for row, output in zip(part, outputs, strict=True)]

    return [(rows[at], output) for at, output in in_shares(rows, trainer.args, asked)]


def drawn(trainer: Any, sample: Sample) -> list[Any]:
    """The pictures that a sample is, as PIL images."""
    return [to_pil(sample.output)] if trainer.actor.makes_images else []


def answered(trainer: OnlineTrainer, rows: Rows) -> tuple[dict[str, float], list[SampleRow]]:
    """Rewards of the most likely answers to some prompts, all and by the rows' column `kind`; and samples."""
    names = trainer.rewards.names
    found = most_likely(trainer, rows)
    values = [output.values for _, output in found]
    figures = _by_kind([row for row, _ in found], values, names, trainer.rewards.weights)
    every = max(1, len(found) // SAMPLES_SHOWN)
    return figures, [_sample(trainer, *each) for each in found[::every][:SAMPLES_SHOWN]]


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
    several = int((weights != 0).sum()) > 1
    for row, given, whole in zip(rows, values, total, strict=True):
        if several:
            by_name["reward"].append(whole)
        for name, value in zip(names, given, strict=True):
            by_name[name].append(value)
            if isinstance(row.get("kind"), str):
                by_name[f"{name}/{row['kind']}"].append(value)
    means = {name: torch.tensor(given).nanmean().item() for name, given in by_name.items()}
    return {name: mean for name, mean in means.items() if mean == mean}


def _sample(trainer: OnlineTrainer, row: dict, output: Output) -> SampleRow:
    images, question = trainer.actor.question(row)
    columns = {name: row[name] for name in ("kind",) if name in row}
    scored = dict(zip(trainer.rewards.names, output.values, strict=True))
    if output.images:  # what it got stands below the picture
        said = "\n".join(
            f"{readable(part_name(name))} {format_number(value)}" for name, value in scored.items() if value == value
        )
        return SampleRow(images, question, "", after=said, columns=columns, after_images=output.images)
    columns |= {f"{name} of the last answer": f"{value:.2f}" for name, value in scored.items()}
    reference = next((row[name] for name in ("solution", "answer") if isinstance(row.get(name), str)), "")
    # a completion may say it in many words: that it is not the reference alone is not wrong
    return SampleRow(images, question, reference, after=output.text, columns=columns, verbatim=False)


def keep_samples(trainer: OnlineTrainer, rollout: Rollout) -> None:
    """A table for the report, of the first round in every `sample_every` steps."""
    args, every, tables = trainer.args, trainer.args.sample_every, trainer.report.rollouts
    if not every or not args.should_save or args.num_completions_to_print == 0:
        return
    if not tables or trainer.state.global_step // every > (tables[-1].step - 1) // every:
        table = _table(trainer, rollout, trainer.state.global_step)
        trainer.report.add_rollouts(table)
        images = [(image, _caption(row)) for row in table.rows for image in row.output_images]
        hand_over(trainer, "rollouts", [image for image, _ in images], [caption for _, caption in images])


def _caption(row: RolloutRow) -> str:
    return f"{row.prompt} ({format_number(row.reward)})"


def print_samples(trainer: OnlineTrainer, rollout: Rollout) -> None:
    """The first samples of a rollout on the terminal."""
    if trainer.args.num_completions_to_print != 0:
        print(rollout_text(_table(trainer, rollout, trainer.buffer.born)), flush=True)


def _table(trainer: OnlineTrainer, rollout: Rollout, born: int) -> RolloutTable:
    """A rollout's first samples, at the number of the first step that learns from them."""
    rows, tokens = [], trainer.actor.unit == "token"
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
                advantage=None if rollout.advantages is None else float(rollout.advantages[at]),
                tokens=int(rollout.lengths[at]) if tokens else None,
                finished=not bool(rollout.truncated[at]) if tokens else None,
                group=at // rollout.group_size,
                extra={name: _text(values[at]) for name, values in rollout.extras.items()},
                output_images=drawn(trainer, sample),
            )
        )
    return RolloutTable(born + 1, rows)


def _text(value: Any) -> str:
    return "" if value is None else str(value)
