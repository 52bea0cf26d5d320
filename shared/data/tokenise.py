"""Whole data sets to tokens: in batches, in several processes where asked, kept on disk, and told about.

How one row becomes tokens stands in encoding.py.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache import cache_folder, locked
from shared.data.encoding import Asked, Batch, Tokeniser
from shared.data.rows import Rows
from shared.data.schema import describe_bad
from shared.data.token_cache import data_fingerprint, load_table, save_table, table_key
from shared.data.tokens import TokenTable
from shared.errors import DataError, UserError

__all__ = ["Asked", "TokenSummary", "Tokeniser", "tokenise", "tokenise_stream"]

logger = logging.getLogger(__name__)

BATCH = 1000  # rows tokenised at a time
_PERCENTS = (0, 50, 90, 99, 100)


@dataclass
class TokenSummary:
    """What tokenising did to a data set.

    Attributes:
        rows: how many there were.
        used: how many there are now.
        tokens: of those, after cutting.
        lengths: part of a row -> its tokens before cutting: least, median, 90 %, 99 %, most.
        cut: how many rows lost tokens.
        lost: how many tokens those lost.
        left_out: row number -> why it is left out.
        endless: rows that teach no end: what is learnt last in them is no end-of-sequence token.
        rows_per_second: how fast it was; None where the tokens were found in the cache.
    """

    rows: int
    used: int
    tokens: int
    lengths: dict[str, list[int]] = field(default_factory=dict)
    cut: int = 0
    lost: int = 0
    left_out: dict[int, str] = field(default_factory=dict)
    endless: int = 0
    rows_per_second: float | None = None

    def text(self, what: str, max_listed: int = 10) -> str:
        """What was done, in a few lines."""
        lines = [f"{what}: {self.used:,} rows, {self.tokens:,} tokens"]
        for part, values in self.lengths.items():
            named = f"{part}: " if len(self.lengths) > 1 else ""
            lines.append(
                "  {}{:,} to {:,} tokens, median {:,}, 90 % up to {:,}, 99 % up to {:,}".format(
                    named, values[0], values[4], *values[1:4]
                )
            )
        if self.cut:
            share, lost = self.cut / self.used, self.lost / (self.tokens + self.lost)
            lines.append(f"  {self.cut:,} rows ({share:.1%}) are cut: {self.lost:,} tokens ({lost:.1%}) are lost")
        if self.endless:
            lines.append(
                f"  {self.endless:,} rows ({self.endless / self.used:.1%}) teach no end: no end-of-sequence token is "
                "the last that is learnt"
            )
        if self.left_out:
            listed = list(self.left_out.values())
            lines.append(f"  {len(listed):,} of {self.rows:,} rows are left out:")
            lines += [f"    {reason}" for reason in listed[:max_listed]]
            if len(listed) > max_listed:
                lines.append(f"    and {len(listed) - max_listed:,} more")
        return "\n".join(lines)


def tokenise(
    rows: Any, tokeniser: Tokeniser, *, num_proc: int | None = None, what: str = "train", cache: bool = True
) -> tuple[TokenTable, TokenSummary]:
    """Tokenise a data set, or find it tokenised in the cache.

    Args:
        rows: shared.data.rows.Rows, a datasets.Dataset, or a list of dicts.
        tokeniser: how a row becomes tokens.
        num_proc: more than 1: so many processes. The tokenizer works in parallel without, where
            `TOKENIZERS_PARALLELISM` allows it; processes help where much time goes into chat templates.
        what: the name of the data, for errors.
        cache: look for the tokens on disk, and keep them there; processes of one machine wait for the first of them.
            Rows with values that cannot be told apart for certain (any Python object) are tokenised anew each time.

    Raises:
        DataError: bad rows with `on_bad_row="error"`, or no row that can be used.
        UserError: `num_proc` below 1.
    """
    if num_proc is not None and num_proc < 1:
        raise UserError(f"num_proc is {num_proc}; allowed: 1 or more.")
    rows = _narrowed(rows if isinstance(rows, Rows) else Rows(rows), tokeniser.columns)
    known = data_fingerprint(rows, tokeniser.columns) if cache else None
    if known is None:
        return _made(rows, tokeniser, num_proc, what)
    path = cache_folder() / table_key(tokeniser.key, known)
    found = _kept(path)
    if found is not None:
        return found
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except OSError as error:
            _warn(path, error)
            return _made(rows, tokeniser, num_proc, what)
        found = _kept(path)
        if found is not None:
            return found
        table, summary = _made(rows, tokeniser, num_proc, what)
        try:
            save_table(path, table, {**asdict(summary), "rows_per_second": None})
        except OSError as error:
            _warn(path, error)
        mapped = load_table(path)
        return (mapped[0] if mapped else table), summary


def _kept(path: Path) -> tuple[TokenTable, TokenSummary] | None:
    """The tokens in the cache, with what tokenising did; None where there are none."""
    found = load_table(path)
    if found is None:
        return None
    table, notes = found
    return table, TokenSummary(**{**notes, "left_out": {int(row): why for row, why in notes["left_out"].items()}})


def _warn(path: Path, error: OSError) -> None:
    logger.warning("Tokens are not kept: %s cannot be written to (%s).", path.parent, error)


def tokenise_stream(stream: Any, tokeniser: Tokeniser, *, batch_size: int = 256) -> Any:
    """A datasets.IterableDataset whose rows are tokenised when they are asked for, as Tokeniser.rows gives them."""

    def work(batch: dict[str, list]) -> dict[str, list]:
        names = list(batch)
        rows = [dict(zip(names, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        found = tokeniser.rows(rows)
        columns = dict.fromkeys(name for row in found for name in row)
        return {name: [row.get(name) for row in found] for name in columns}

    names = stream.column_names or list(next(iter(stream)))
    return stream.map(work, batched=True, batch_size=batch_size, remove_columns=names)


def _narrowed(rows: Rows, columns: tuple[str, ...]) -> Rows:
    """The rows without columns that nobody looks at, which cost time to read."""
    dataset = rows.dataset
    if not hasattr(dataset, "select_columns") or dataset.format["type"] is not None:
        return rows
    names = [name for name in dataset.column_names if name in columns]
    return Rows(dataset.select_columns(names), rows.kept, rows.left_out)


def _made(rows: Rows, tokeniser: Tokeniser, num_proc: int | None, what: str) -> tuple[TokenTable, TokenSummary]:
    start = time.perf_counter()
    if not len(rows):
        raise DataError(f"The {what} data is empty: it has no rows.")
    parts = list(_parts(rows, tokeniser, num_proc or 1))
    bad = {row: why for _, batch in parts for row, why in batch.bad.items()}
    if bad and (tokeniser.on_bad_row == "error" or len(bad) == len(rows)):
        skipping = tokeniser.on_bad_row == "skip"
        reasons = {row: why.removeprefix(f"row {row}: ") for row, why in bad.items()}
        raise DataError(describe_bad(reasons, len(rows), what, skipping=skipping))
    table = TokenTable.join([table for table, _ in parts])
    if "margin" in table.columns:
        margins = table.columns.pop("margin")
        if not np.isnan(margins).all():
            table = table.with_column("margin", np.nan_to_num(margins, nan=0.0))
    sizes: dict[str, list[int]] = {}
    for _, batch in parts:
        for part, values in batch.sizes.items():
            sizes.setdefault(part, []).extend(values)
    cut = [before - after for _, batch in parts for before, after in batch.cut.values()]
    summary = TokenSummary(
        rows=len(rows),
        used=len(table),
        tokens=int(table.lengths.sum()),
        lengths={
            part: np.percentile(values, _PERCENTS, method="nearest").astype(int).tolist()
            for part, values in sizes.items()
        },
        cut=len(cut),
        lost=sum(cut),
        left_out=bad,
        endless=sum(batch.endless for _, batch in parts),
        rows_per_second=len(rows) / (time.perf_counter() - start),
    )
    return table, summary


def _parts(rows: Rows, tokeniser: Tokeniser, processes: int) -> Iterator[tuple[TokenTable, Batch]]:
    starts = range(0, len(rows), BATCH)
    if processes == 1 or len(starts) == 1:
        yield from (_part(rows, tokeniser, start) for start in starts)
        return
    global _shared
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork; each process has its own rows
    _shared = (rows, tokeniser)
    try:
        with ProcessPoolExecutor(min(processes, len(starts)), mp_context=get_context("fork")) as pool:
            yield from pool.map(_forked_part, starts)
    finally:
        _shared = None
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


_shared: tuple[Rows, Tokeniser] | None = None  # what a forked process works on, without pickling it


def _forked_part(start: int) -> tuple[TokenTable, Batch]:
    assert _shared is not None
    return _part(*_shared, start)


def _part(rows: Rows, tokeniser: Tokeniser, start: int) -> tuple[TokenTable, Batch]:
    batch = tokeniser.encode(rows.__getitems__(list(range(start, min(start + BATCH, len(rows))))))
    table = batch.table()
    batch.records = []
    return table, batch
