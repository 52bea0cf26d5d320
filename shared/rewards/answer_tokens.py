"""Answers as what a scoring model reads: the rows of tokens that its trainer makes of them, in batches of like length.

Deliberately not here: the models (models.py, shared.trainers.reward_adapter).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shared.data.rows import ROW
from shared.data.schema import Kind
from shared.data.tokenise import Tokeniser
from shared.errors import DataError, UserError
from shared.rewards.base import text_of


def in_batches(
    rows: Sequence[Any],
    length: Callable[[Any], int],
    score: Callable[[Sequence[Any]], Sequence[Any]],
    batch_size: int,
) -> list[Any]:
    """What `score` gives for each row, rows of like length together.

    Args:
        rows: in any order.
        length: of a row.
        score: gets at most `batch_size` rows, and gives one value for each.
        batch_size: the most rows at once.
    """
    order = sorted(range(len(rows)), key=lambda at: length(rows[at]))
    found = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        found |= zip(part, score([rows[at] for at in part]), strict=True)
    return [found[at] for at in range(len(rows))]


class AnswerTokens:
    """Answers to prompts as the tokens that a scoring model reads, written as in its training.

    Args:
        tokenizer: the model's; is given a token to pad with where it has none.
        step_separator: divides a completion into the steps that are scored; None: whole answers are.
        max_length: longer rows are cut as in training; None: no cut.
        template_kwargs: more variables for the chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        step_separator: str | None = None,
        max_length: int | None = None,
        template_kwargs: dict[str, Any] | None = None,
    ):
        self.tokenizer, self.step_separator = tokenizer, step_separator
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        steps = {} if step_separator is None else {"step_separator": step_separator}
        self.tokeniser = Tokeniser(
            tokenizer,
            Kind.STEPWISE if steps else Kind.UNPAIRED,
            max_length=max_length,
            template_kwargs=template_kwargs,
            **steps,
        )

    def rows(self, name: str, prompts: Sequence[Any], completions: Sequence[Any] | None) -> list[dict[str, Any]]:
        """Rows of `input_ids`, where steps are scored with their `step_ends`.

        Args:
            name: of the reward, for messages.
            prompts, completions: strings, or lists of messages.

        Raises:
            UserError: images are to be scored.
            DataError: a row that cannot be written or read, named by its place.
        """
        if completions is None or any(map(_shows, prompts)) or any(map(_shows, completions)):
            raise UserError(
                f"{name} reads text alone, and what it is to score has images. Use a reward model that sees "
                "them (VLMRewardTrainer makes one), or a function that hands it the text."
            )
        rows, found = {}, {}
        for at, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            said = text_of(completion)
            if self.step_separator is not None:
                steps = [step for step in said.split(self.step_separator) if step.strip()] or [""]
                rows[at] = {"prompt": prompt, "completions": steps, "labels": [True] * len(steps)}
            elif said.strip():
                rows[at] = {"prompt": prompt, "completion": completion, "label": True}
            else:  # nothing was answered: no row of a data set is like it, yet it has a score
                word = "." if isinstance(completion, str) else [{"role": "assistant", "content": "."}]
                asked = self.tokeniser.ask({"prompt": prompt, "completion": word, ROW: at})
                found[at] = {"input_ids": [*asked.prompt_ids, self.tokenizer.eos_token_id]}
        batch = self.tokeniser.encode(list(rows.values()), list(rows))
        if batch.bad:
            raise DataError(next(iter(batch.bad.values())))
        for at, record in zip(batch.rows, batch.records, strict=True):
            whole = [*record["prompt_ids"], *record["completion_ids"]] if "prompt_ids" in record else None
            found[at] = record if whole is None else {"input_ids": whole}
        return [found[at] for at in range(len(prompts))]

    def padded(self, rows: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Right-padded `(B, T)` ids of rows, and 1 where a token is a row's own."""
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        attention = torch.zeros_like(ids)
        for at, row in enumerate(rows):
            ids[at, : len(row["input_ids"])] = torch.as_tensor(row["input_ids"])
            attention[at, : len(row["input_ids"])] = 1
        return ids, attention


def _shows(said: Any) -> bool:
    """Whether a prompt or an output is, or holds, something else than text."""
    if isinstance(said, str):
        return False
    contents = [turn.get("content") for turn in said] if isinstance(said, (list, tuple)) else [[said]]
    parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
    return any(not isinstance(part, Mapping) or part.get("type", "text") != "text" for part in parts)
