"""Rows that are too long: which tokens go. Nothing is cut without being counted."""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import UserError

TRUNCATION_MODES = ("keep_start", "keep_end")


@dataclass(frozen=True)
class Limits:
    """How long a row may be, in tokens; None: no limit.

    Args:
        max_length: of the whole row; of a pair, prompt and either answer.
        max_prompt_length: longer prompts lose their start, which is furthest from the answer.
        max_completion_length: longer answers lose their end.
        truncation_mode: `keep_start` cuts the row's end; `keep_end` its start: of a row with an answer the prompt's
            start, but for its last token, and the answer's end where that does not do.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_start"

    def __post_init__(self):
        if self.truncation_mode not in TRUNCATION_MODES:
            raise UserError(f"truncation_mode is {self.truncation_mode!r}; allowed: {', '.join(TRUNCATION_MODES)}.")
        for name in ("max_length", "max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; allowed: 1 or more, or nothing for no limit.")

    def kept(self, length: int) -> slice:
        """What stays of a row that has no prompt apart."""
        if self.max_length is None or length <= self.max_length:
            return slice(0, length)
        if self.truncation_mode == "keep_end":
            return slice(length - self.max_length, length)
        return slice(0, self.max_length)

    def kept_parts(self, prompt: int, answers: list[int]) -> tuple[slice, list[slice]]:
        """What stays of a prompt and of each of its answers, given how many tokens they have.

        An answer may be left with nothing, where the prompt alone fills the row.
        """
        first = 0 if self.max_prompt_length is None else max(0, prompt - self.max_prompt_length)
        most = self.max_completion_length
        stops = [length if most is None else min(length, most) for length in answers]
        if self.max_length is not None:
            over = prompt - first + max(stops) - self.max_length
            if over > 0 and self.truncation_mode == "keep_end":
                first = min(first + over, max(first, prompt - 1))
            room = max(0, self.max_length - (prompt - first))
            stops = [min(stop, room) for stop in stops]
        return slice(first, prompt), [slice(0, stop) for stop in stops]
