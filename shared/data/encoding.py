"""Rows to tokens, in batches: each text is tokenised once, and what counts is found by character offsets.

Chats are written by shared.data.chat, strings as they are; see texts.py. Where a token lies over the end of the prompt
it belongs to the answer. Of chats nothing is added to what the template writes; a plain text gets the special tokens
that its tokenizer puts before any text, and an answer or a whole text one end-of-sequence token.

Deliberately not here: padding (collators.py), packing (packing.py), whole data sets (tokenise.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from shared.data.chat import token_ranges
from shared.data.cutting import Limits
from shared.data.records import Record, Tokens, answers_row, given_tokens, prompt_row, steps_row, whole_row
from shared.data.rows import ROW
from shared.data.schema import Kind
from shared.data.text_checks import check_tokens
from shared.data.texts import SUPERVISED, Text, Writer
from shared.data.tokens import NOTE, TokenTable
from shared.errors import DataError, UserError

logger = logging.getLogger(__name__)

FORMAT = 2  # of the tokens in a cache: raised when the same rows come to be tokenised otherwise


@dataclass(frozen=True)
class Asked:
    """A row up to the answer that the model is to give.

    Attributes:
        prompt_text: what the model is given, as text.
        prompt_ids: its tokens.
        answer: the answer in the data as the model that learnt it says it, decoded without special tokens; None where
            there is none to tell apart, as in plain text.
    """

    prompt_text: str
    prompt_ids: list[int]
    answer: str | None


@dataclass
class Batch:
    """What became of some rows.

    Attributes:
        records: one dict a row that can be used, lists of tokens and bytes of zeros and ones.
        rows: their numbers.
        bad: row number -> why it cannot be used.
        cut: row number -> tokens it had and tokens it has, for rows that lost some.
        sizes: part of a row -> how many tokens it has in each row, before cutting.
        endless: how many rows teach no end: what is learnt last is no end-of-sequence token.
    """

    records: list[Record] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    cut: dict[int, tuple[int, int]] = field(default_factory=dict)
    sizes: dict[str, list[int]] = field(default_factory=dict)
    endless: int = 0

    def table(self) -> TokenTable:
        """The usable rows as flat arrays."""
        return TokenTable.of_records(self.records, self.rows)


class Tokeniser:
    """Turns rows of one kind into token arrays.

    Args:
        tokenizer: a fast tokenizer (one that gives character offsets).
        kind: what the rows are.
        loss_on: what is learnt in supervised rows: `all`, `completion` or `assistant`. Of rows of messages among
            prompts with completions, `completion` is what the assistant says.
        max_length: longer rows are cut, or, where nothing of what is learnt is left, bad.
        max_prompt_length: longer prompts lose their start.
        max_completion_length: longer answers lose their end.
        truncation_mode: `keep_start` or `keep_end`, see shared.data.cutting.Limits.
        template_kwargs: more variables for the chat template.
        step_separator: what follows each step of a stepwise row; its last token carries the step's label.
        last_step_only: label the last step alone.
        text_field: the column of plain text.
        on_bad_row: `error`, or `skip` to leave bad rows out.

    Raises:
        UserError: a slow tokenizer, or options that cannot work.
    """

    def __init__(
        self,
        tokenizer: Any,
        kind: Kind,
        *,
        loss_on: str = "all",
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        max_completion_length: int | None = None,
        truncation_mode: str = "keep_start",
        template_kwargs: dict[str, Any] | None = None,
        step_separator: str = "\n",
        last_step_only: bool = False,
        text_field: str = "text",
        on_bad_row: str = "error",
    ):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                f"The {type(tokenizer).__name__} is a slow tokenizer: it does not tell which characters a token "
                "stands for, so what is learnt cannot be told. Give the model's fast tokenizer (AutoTokenizer)."
            )
        if on_bad_row not in ("error", "skip"):
            raise UserError(f"on_bad_row is {on_bad_row!r}; allowed: error, skip.")
        if kind is Kind.STEPWISE and not step_separator:
            raise UserError("step_separator is empty: its last token carries a step's label. Give at least a space.")
        self.tokenizer, self.kind, self.on_bad_row = tokenizer, kind, on_bad_row
        self.limits = Limits(max_length, max_prompt_length, max_completion_length, truncation_mode)
        self.last_step_only = last_step_only
        self.writer = Writer(
            tokenizer,
            kind,
            loss_on=loss_on,
            template_kwargs=template_kwargs,
            step_separator=step_separator,
            text_field=text_field,
        )
        self.eos: int | None = tokenizer.eos_token_id
        self._ends = {self.eos, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        self._lead = _leading(tokenizer)
        self._blank: dict[int, bool] = {}  # token -> whether it is white space alone

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the data set that are looked at."""
        return self.writer.columns

    @cached_property
    def key(self) -> str:
        """A hash of all that decides which tokens a row becomes."""
        writer = self.writer
        options = [
            FORMAT,
            self.kind,
            writer.loss_on,
            asdict(self.limits),
            writer.template_kwargs,
            writer.step_separator,
            writer.text_field,
            self.last_step_only,
            self.on_bad_row,
            self.tokenizer.chat_template,
            self.tokenizer.special_tokens_map,
            self._lead,
        ]
        digest = hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode())
        digest.update(self._backend().to_str().encode())
        return digest.hexdigest()[:32]

    def rows(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows as arrays, as TokenTable gives them, for a stream; what was cut is told under `NOTE`.

        Raises:
            DataError: a bad row, with `on_bad_row="error"`; otherwise it is left out with a warning.
        """
        batch = self.encode(rows)
        for reason in batch.bad.values():
            if self.on_bad_row == "error":
                raise DataError(reason)
            logger.warning("Left out: %s", reason)
        table = batch.table()
        found = [table[at] for at in range(len(table))]
        for row in found:
            if math.isnan(row.get("margin", 0.0)):
                del row["margin"]
            if row[ROW] in batch.cut:
                row[NOTE] = "cut from {} tokens to {}".format(*batch.cut[row[ROW]])
        return found

    def ask(self, row: dict[str, Any], room: int | None = None) -> Asked:
        """The row up to the answer that the model is to give; of plain text its first half.

        Args:
            row: as it is in the data set.
            room: the most tokens of the prompt. It loses its start beyond that, `max_prompt_length` or `max_length`.

        Raises:
            DataError: the row cannot be read.
        """
        number = int(row.get(ROW, 0))
        if self.kind in (Kind.LANGUAGE_MODELING, Kind.TOKENS):
            batch = self.encode([row], [number])
            if batch.bad:
                raise DataError(batch.bad[number])
            record = batch.records[0]
            ids, learnt = record["input_ids"], record["learnt"]
            at = len(ids) // 2 if self.kind is Kind.LANGUAGE_MODELING else max(1, learnt.find(1))
            end = learnt.find(0, at)
            said = None if self.kind is Kind.LANGUAGE_MODELING else ids[at : end if end > 0 else None]
            prompt, ids = self.tokenizer.decode(ids[:at]), ids[:at]
        else:
            text, answer = self.writer.ask(row, number)
            ((ids, _), (said, _)) = self._tokens([text, Text(answer, None, plain=False, ends=False)])
            prompt = text.text
        limits = (room, self.limits.max_prompt_length, self.limits.max_length)
        most = min([len(ids), *(limit for limit in limits if limit is not None)])
        answer = None if said is None else self.tokenizer.decode(said, skip_special_tokens=True)
        return Asked(prompt, ids[len(ids) - most :], answer)

    def encode(self, rows: Sequence[dict[str, Any]], numbers: Sequence[int] | None = None) -> Batch:
        """Tokenise rows; what cannot be used is told in the batch and never raised."""
        batch = Batch()
        numbers = [int(row.get(ROW, at)) for at, row in enumerate(rows)] if numbers is None else numbers
        batch.records = self._records(rows, numbers, batch)
        return batch

    def _records(self, rows: Sequence[dict], numbers: Sequence[int], batch: Batch) -> list[Record]:
        written: list[tuple[dict, int, list[Text]]] = []
        for row, number in zip(rows, numbers, strict=True):
            try:
                if self.kind is Kind.TOKENS:
                    check_tokens(row, number, self.writer.loss_on, self._vocabulary)
                    written.append((row, number, []))
                else:
                    written.append((row, number, self.writer.write(row, number)))
            except DataError as error:
                batch.bad[number] = str(error)
        tokens = iter(self._tokens([text for _, _, texts in written for text in texts]))
        records = []
        for row, number, texts in written:
            own = [next(tokens) for _ in texts] if texts else [given_tokens(row, self.writer.loss_on)]
            try:
                record, sizes = self._record(row, number, own)
            except DataError as error:
                batch.bad[number] = str(error)
                continue
            for part, size in sizes.items():
                batch.sizes.setdefault(part, []).append(size)
            before = sum(sizes.values())
            after = sum(len(value) for name, value in record.items() if name.endswith("_ids"))
            if after < before:
                batch.cut[number] = (before, after)
            batch.endless += self._teaches_no_end(record)
            batch.rows.append(number)
            records.append(record)
        return records

    def _tokens(self, texts: Sequence[Text]) -> list[Tokens]:
        """Tokens of each text, and the ranges of those that count."""
        if not texts:
            return []
        backend = self._backend()
        encode = backend.encode_batch_fast if all(text.spans is None for text in texts) else backend.encode_batch
        found = []
        for text, encoding in zip(texts, encode([t.text for t in texts], add_special_tokens=False), strict=True):
            ids = encoding.ids
            ranges = [(0, len(ids))] if text.spans is None else token_ranges(encoding.offsets, text.spans)
            if text.plain and self._lead and ids[: len(self._lead)] != self._lead:
                shift = len(self._lead)
                ids = self._lead + ids
                ranges = [(first + shift * (text.spans is not None), last + shift) for first, last in ranges]
            if text.ends and self.eos is not None and self._last_said(ids) != self.eos:
                ids.append(self.eos)
                ranges[-1] = (ranges[-1][0], len(ids))
            found.append((ids, ranges))
        return found

    def _backend(self) -> Any:
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()  # a tokenizer's file may ask for either
        backend.no_padding()
        return backend

    def _record(self, row: dict, number: int, own: list[Tokens]) -> tuple[Record, dict[str, int]]:
        """A row's columns after cutting, and how many tokens its parts had."""
        if self.kind in SUPERVISED:
            return whole_row(own[0], number, self.limits)
        if self.kind is Kind.PROMPT_ONLY:
            return prompt_row(own[0], number, self.limits)
        if self.kind is Kind.STEPWISE:
            return steps_row(own[0], row, number, self.limits, last_only=self.last_step_only)
        return answers_row(own, row, self.kind, number, self.limits)

    def _teaches_no_end(self, record: Record) -> bool:
        if self.kind in (Kind.STEPWISE, Kind.PROMPT_ONLY):
            return False
        if "learnt" in record:
            return self._last_said(record["input_ids"], record["learnt"].rfind(1) + 1) not in self._ends
        answers = (record[name] for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in record)
        return any(self._last_said(answer) not in self._ends for answer in answers)

    def _last_said(self, ids: Sequence[int], stop: int | None = None) -> int | None:
        """The last token that is not of white space alone, as a template may write behind the end of a turn."""
        return next(
            (token for token in reversed(ids[:stop]) if token in self._ends or not self._is_blank(token)), None
        )

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self.tokenizer.decode([token]).strip()
        return self._blank[token]

    @cached_property
    def _vocabulary(self) -> int:
        """One more than the highest token number."""
        return max(self.tokenizer.get_vocab().values()) + 1


def _leading(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before any text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return full[:at]
