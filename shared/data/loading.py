"""Find data sets by name (built in, local, or on the hub), mix them, and set rows apart for evaluation.

Deliberately not here: what the columns mean (schema.py), what is made of columns of other names (columns.py) and how
local files are read (files.py). No code from a data
set's repository is ever run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from shared.data.columns import adapt, check_given
from shared.data.files import align, load_local
from shared.data.images import undecoded
from shared.data.schema import column_names
from shared.errors import DataError, UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

_TEST_FALLBACKS = ("validation", "val", "valid", "dev")


@dataclass(frozen=True)
class Source:
    """One data set of a run.

    Attributes:
        name: as the user gave it.
        where: "builtin", "local" or "hub".
        train_rows: rows it gives to training, before `max_train_rows` and repetition in a mixture; None in a stream.
        test_rows: rows it gives to evaluation.
        test_split: the split those come from; "held out" where they were taken from the training split; None: none.
        weight: its share of the mixture, of 1; None without weights.
        adapted: what was done to its columns; None: nothing.
    """

    name: str
    where: str
    train_rows: int | None
    test_rows: int | None
    test_split: str | None
    weight: float | None
    adapted: str | None = None


@dataclass(frozen=True)
class LoadedData:
    """Rows to train on, rows to evaluate on (None: there are none), and where they come from."""

    train: Dataset | IterableDataset
    test: Dataset | IterableDataset | None
    sources: list[Source]


def load_datasets(
    names: str | Sequence[str],
    *,
    config: str | None = None,
    weights: Sequence[float] | None = None,
    train_split: str = "train",
    test_split: str = "test",
    eval_fraction: float = 0.0,
    streaming: bool = False,
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
    columns: Mapping[str, str] | None = None,
    seed: int = 0,
) -> LoadedData:
    """Load one data set or a mixture, images not decoded.

    Several data sets are joined end to end; with `weights`, each next row comes from a source drawn by weight, until
    every row of every source was used at least once (small sources repeat; nothing is cut). Columns that a source
    lacks are None in its rows, and those of other names are read as shared.data.columns says. Evaluation rows are
    those of each source's test split; a source without one holds `eval_fraction` of its training rows out, before the
    mixture, so that no row is in both.

    Args:
        names: built-in names (`builtin/...`), paths of files or folders, hub ids.
        config: the configuration of a hub data set.
        weights: one positive number a name.
        train_split: the split to train on.
        test_split: the split to evaluate on; left at "test", a validation (val, valid, dev) split does where it lacks.
        eval_fraction: the share, in [0, 1), of the training rows to hold out where there is no test split.
        streaming: read rows when they are asked for; nothing can be held out then.
        max_train_rows: use the first so many rows; of a mixture, rows evenly spread over it.
        max_eval_rows: the same for evaluation.
        columns: name in the data -> the suite's name for it; where a data set has one, nothing else is made of it.
        seed: draws the mixture and the rows held out.

    Raises:
        UserError: a name, split or option that cannot work. DataError: a file that cannot be read, or no rows.
    """
    names = [names] if isinstance(names, str) else list(names)
    shares = _check_options(names, weights, eval_fraction, streaming, max_train_rows, max_eval_rows)
    trains, tests, sources, found = [], [], [], set()
    for name, share in zip(names, shares, strict=True):
        where, splits = _find(name, config, streaming, columns)
        train = _split(name, splits, train_split)
        found.update(column_names(train))
        train, adapted = adapt(train, columns)
        tested = _test_split(splits, train_split, test_split)
        test = adapt(_split(name, splits, tested), columns)[0] if tested else None
        if test is None and eval_fraction:
            train, test = _hold_out(name, train, eval_fraction, seed)
            tested = "held out"
        trains.append(train)
        if test is not None:
            tests.append(test)
        sources.append(Source(name, where, _rows(train), _rows(test), tested, share, adapted))
    check_given(columns, found)
    if not tests and test_split != "test":
        raise UserError(f"No data set has a split {test_split!r} to evaluate on. Leave it out, or set eval_fraction.")
    train = _mix(names, trains, None if weights is None else shares, seed)
    test = _mix(names, tests, None, seed) if tests else None
    spread = len(names) > 1
    return LoadedData(_limit(train, max_train_rows, spread), _limit(test, max_eval_rows, spread), sources)


def _check_options(
    names: Sequence[str],
    weights: Sequence[float] | None,
    eval_fraction: float,
    streaming: bool,
    max_train_rows: int | None,
    max_eval_rows: int | None,
) -> list[float] | list[None]:
    """Raise UserError for options that cannot work; returns the weights as shares of 1."""
    if not names:
        raise UserError("No data set was given: dataset_name takes a built-in name, a path or a hub id, or several.")
    if not 0 <= eval_fraction < 1:
        raise UserError(f"eval_fraction is {eval_fraction}; allowed: 0 (none) up to, not including, 1.")
    if streaming and eval_fraction:
        raise UserError("eval_fraction cannot hold rows out of a stream: give data with a test split instead.")
    for name, value in (("max_train_rows", max_train_rows), ("max_eval_rows", max_eval_rows)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; allowed: 1 or more, or nothing for all rows.")
    if weights is None:
        return [None] * len(names)
    if len(weights) != len(names) or any(weight <= 0 for weight in weights):
        raise UserError(f"dataset_weights is {list(weights)} for {len(names)} data sets; give each a positive number.")
    return [weight / sum(weights) for weight in weights]


def _find(
    name: str, config: str | None, streaming: bool, columns: Mapping[str, str] | None
) -> tuple[str, dict[str, Callable[[], Any]]]:
    """Where a data set is, and its splits, each as a function that gives the rows."""
    from shared import builtin

    if builtin.is_builtin(name):
        return "builtin", {split: partial(_load_builtin, name, split, streaming) for split in builtin.SPLITS}
    path = os.path.expanduser(name)
    if os.path.exists(path):
        where, splits = "local", load_local(path, streaming=streaming, columns=columns)
    else:
        where, splits = "hub", _load_hub(name, config, streaming)
    return where, {split: partial(undecoded, dataset) for split, dataset in splits.items()}


def _load_builtin(name: str, split: str, streaming: bool) -> Any:
    from shared import builtin

    dataset = undecoded(builtin.load_dataset(name, split))
    return dataset.to_iterable_dataset() if streaming else dataset


def _load_hub(name: str, config: str | None, streaming: bool) -> dict[str, Any]:
    from shared import builtin
    from shared.hub import require_available

    hint = f"Built-in data sets: {', '.join(builtin.DATASETS)}."
    try:
        require_available(name, file="README.md", what="data set", repo_type="dataset")
    except UserError as error:
        raise UserError(f"{error} {hint}") from error

    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return dict(load_dataset(name, config, streaming=streaming))
    # The hub's and the library's own errors: no such data set, gated, an unknown configuration, a loading script.
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"data set {name!r} is no local path, and the hub did not give it: {error} {hint}") from error


def _split(name: str, splits: dict[str, Callable[[], Any]], split: str) -> Any:
    if split not in splits:
        raise UserError(f"data set {name!r} has no split {split!r}; its splits are: {', '.join(splits)}.")
    dataset = splits[split]()
    if _rows(dataset) == 0:
        raise DataError(f"data set {name!r} is empty: its split {split!r} has no rows.")
    return dataset


def _test_split(splits: dict[str, Any], train_split: str, test_split: str) -> str | None:
    wanted = (test_split, *_TEST_FALLBACKS) if test_split == "test" else (test_split,)
    return next((split for split in wanted if split in splits and split != train_split), None)


def _hold_out(name: str, dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    import numpy as np

    rows = len(dataset)
    if rows < 2:
        raise UserError(f"data set {name!r} has {rows} row: none can be held out for evaluation. Set eval_fraction=0.")
    count = min(max(1, round(rows * fraction)), rows - 1)
    held_out = np.zeros(rows, dtype=bool)
    held_out[np.random.default_rng(seed).permutation(rows)[:count]] = True
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def _mix(names: Sequence[str], datasets: list[Any], shares: Sequence[float] | None, seed: int) -> Any:
    if len(datasets) == 1:
        return datasets[0]
    from datasets import Dataset, concatenate_datasets, interleave_datasets

    try:
        if isinstance(datasets[0], Dataset):
            datasets = align(datasets)
        if shares is None:
            return concatenate_datasets(datasets)
        return interleave_datasets(datasets, probabilities=list(shares), seed=seed, stopping_strategy="all_exhausted")
    except (ValueError, TypeError) as error:
        raise UserError(f"The data sets {', '.join(names)} cannot be mixed: {error}") from error


def _rows(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _limit(dataset: Any, rows: int | None, spread: bool) -> Any:
    if dataset is None or rows is None:
        return dataset
    total = _rows(dataset)
    if total is None:
        return dataset.take(rows)
    if total <= rows:
        return dataset
    return dataset.select([i * total // rows for i in range(rows)] if spread else range(rows))
