"""What scripts/best_of_n.py does: answers to held-out prompts are sampled, and a table tells what best of n gains.

All n of the table are told from the same samples. Options are read before anything heavy is imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.builtin import recipe
from shared.errors import UserError
from shared.runtime.parser import parse_arguments
from textalign.best_of_n_options import BestOfNOptions

if TYPE_CHECKING:
    from textalign.best_of_n import BestOfNSampler, Candidate


def main(words: Sequence[str] | None = None, *, description: str | None = None) -> None:
    """Sample, tell, and write what is asked for.

    Args:
        words: the options; those of this process where None.
        description: for `--help`.

    Raises:
        UserError: options, data, a model or a reward that cannot be used.
        SystemExit: after `--help`.
    """
    parsed = parse_arguments([BestOfNOptions], words, description=description, recipe=recipe("best_of_n"))
    options: BestOfNOptions = parsed.build(BestOfNOptions)
    if options.output_file is not None and Path(options.output_file).exists():
        raise UserError(f"output_file {options.output_file}: it is there already. Name another one, or delete it.")
    from textalign.best_of_n import check_sizes

    check_sizes(options.sample_size, options.n_candidates)
    prompts, columns = _prompts(options)
    sampler = _sampler(options)
    print(
        f"{options.model_name_or_path}: {options.sample_size} answers to each of {len(prompts)} prompts of "
        f"{', '.join(options.dataset_name)}",
        flush=True,
    )
    found: list[list[Candidate]] = []
    for batch in _answered(sampler, prompts, columns, options):
        if options.output_file is not None:
            _write(options.output_file, prompts[len(found) :], batch, options.n_candidates)
        found += batch
        if len(found) < len(prompts):
            print(f"{len(found)} of {len(prompts)} prompts", flush=True)
    print(table(found, options.n_values))


def table(found: Sequence[Sequence[Candidate]], n_values: Sequence[int]) -> str:
    """Mean score and rewards under best of n, one line for each n, and what the largest n gains.

    Args:
        found: N candidates of each prompt, best first.
        n_values: the n, up to N.
    """
    from textalign.best_of_n import best_of_n_kl

    names = list(found[0][0].rewards)
    means = {n: [_mean(found, name, n) for name in names] for n in n_values}
    score = {n: _mean(found, None, n) for n in n_values}
    widths = [max(len(name), 9) + 2 for name in names]
    told = ["".join([f"{'n':>4}{'KL ≤':>8}{'score':>9}", *(f"{n:>{w}}" for n, w in zip(names, widths, strict=True))])]
    for n in n_values:
        cells = (f"{value:>{width}.3f}" for value, width in zip(means[n], widths, strict=True))
        told.append("".join([f"{n:>4}{best_of_n_kl(n):>8.2f}{score[n]:>9.3f}", *cells]))
    first, last = min(n_values), max(n_values)
    for at, name in enumerate(names):
        told.append(f"{name}: best of {first} {means[first][at]:.3f} → best of {last} {means[last][at]:.3f}")
    return "\n".join(told)


def _mean(found: Sequence[Sequence[Candidate]], name: str | None, n: int) -> float:
    """The mean over prompts of what is expected of the best of n; values that do not apply are left out."""
    from textalign.best_of_n import chances_of_best

    total = weight = 0.0
    for group in found:
        for candidate, chance in zip(group, chances_of_best(len(group), n), strict=True):
            value = candidate.score if name is None else candidate.rewards[name]
            if not math.isnan(value):
                total, weight = total + chance * value, weight + chance
    return total / weight if weight else math.nan


def _prompts(options: BestOfNOptions) -> tuple[list[Any], dict[str, list[Any]]]:
    """The prompts, and the rows' other columns for rewards that take them."""
    from shared.data.loading import load_datasets
    from shared.data.schema import Kind, column_names, detect_kind
    from textalign.prompting import NOT_COLUMNS

    train = options.dataset_split == "train"
    loaded = load_datasets(
        options.dataset_name,
        config=options.dataset_config,
        test_split="test" if train else options.dataset_split,
        max_train_rows=options.max_rows,
        max_eval_rows=options.max_rows,
        columns=options.dataset_columns,
    )
    rows = loaded.train if train or loaded.test is None else loaded.test
    detect_kind(column_names(rows), allowed={Kind.PROMPT_ONLY})
    columns = {name: rows[name][:] for name in column_names(rows) if name not in NOT_COLUMNS}
    return rows["prompt"][:], columns


def _sampler(options: BestOfNOptions) -> BestOfNSampler:
    from shared.rewards.combine import RewardSet
    from textalign.best_of_n import BestOfNSampler

    rewards = RewardSet(options.reward_funcs, weights=options.reward_weights)
    init = {
        "revision": options.model_revision,
        "dtype": options.dtype,
        "attn_implementation": options.attn_implementation,
        "trust_remote_code": options.trust_remote_code,
    }
    return BestOfNSampler(
        options.model_name_or_path,
        None,
        rewards,
        sample_size=options.sample_size,
        seed=options.seed,
        n_candidates=options.n_candidates,
        template_kwargs=options.chat_template_kwargs,
        model_init_kwargs=init,
    )


def _answered(
    sampler: BestOfNSampler, prompts: Sequence[Any], columns: dict[str, list[Any]], options: BestOfNOptions
) -> Iterator[list[list[Candidate]]]:
    """The candidates of a batch of prompts after another."""
    settings = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop_strings")
    for at in range(0, len(prompts), options.batch_size):
        own = slice(at, at + options.batch_size)
        yield sampler.candidates(
            prompts[own],
            columns={name: values[own] for name, values in columns.items()},
            **{name: getattr(options, name) for name in settings},
        )


def _write(path: str, prompts: Sequence[Any], found: Sequence[Sequence[Candidate]], count: int) -> None:
    """Add rows that supervised training takes: `prompt` and the best answer as `completion`."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for prompt, group in zip(prompts, found, strict=False):
            best = group[0].response
            kept = [
                {"completion": each.response, "score": each.score, "rewards": _numbers(each.rewards)}
                for each in group[:count]
            ]
            completion = best if isinstance(prompt, str) else [{"role": "assistant", "content": best}]
            row = {"prompt": prompt, "completion": completion, "score": group[0].score, "candidates": kept}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _numbers(rewards: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: None if math.isnan(value) else value for name, value in rewards.items()}
