"""What a data set's columns mean, and whether its rows can be used.

The columns are the field's: `text`, `messages`, `prompt` with `completion`, `chosen` and `rejected`, ...; a value is a
string or a list of `{"role", "content"}`, a content a string or typed parts. Vision rows add `image` or `images`,
`video` or `videos`.

Deliberately not here: finding and reading data sets (loading.py), templates, tokens and loss masks (chat.py). Nothing
is downloaded, and importing this module imports neither torch nor PIL nor datasets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import Any

from shared.data.conversation import Conversation, media, read_conversation
from shared.data.images import decode_image, iterate_light, undecoded
from shared.data.text_checks import (
    Census,
    check_pair,
    check_steps,
    check_text,
    check_tokens,
    check_unpaired,
    is_truth,
)
from shared.data.videos import video_size
from shared.errors import DataError, UserError

__all__ = [
    "CheckReport",
    "Conversation",
    "Kind",
    "check_rows",
    "column_names",
    "decode_image",
    "detect_kind",
    "require",
    "to_conversation",
    "undecoded",
]

STREAMED_ROWS_CHECKED = 100


class Kind(StrEnum):
    """What the rows of a data set are, by their columns."""

    LANGUAGE_MODELING = "language modeling"
    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt-completion"
    PROMPT_ONLY = "prompt-only"
    PREFERENCE = "preference"
    UNPAIRED = "unpaired preference"
    STEPWISE = "stepwise"
    TOKENS = "tokenised"


# The most specific set comes first: a preference data set often has a `messages` column too.
_COLUMNS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    (Kind.TOKENS, ("input_ids",)),
    (Kind.PREFERENCE, ("chosen", "rejected")),
    (Kind.STEPWISE, ("prompt", "completions", "labels")),
    (Kind.UNPAIRED, ("prompt", "completion", "label")),
    (Kind.PROMPT_COMPLETION, ("prompt", "completion")),
    (Kind.MESSAGES, ("messages",)),
    (Kind.MESSAGES, ("conversations",)),
    (Kind.LANGUAGE_MODELING, ("text",)),
    (Kind.PROMPT_ONLY, ("prompt",)),
)
_CHATS = (Kind.MESSAGES, Kind.PROMPT_COMPLETION, Kind.PROMPT_ONLY)


def column_names(rows: Any) -> list[str]:
    """The columns of a data set; of a list of dicts all that its rows have, of a bare stream the first's."""
    known = getattr(rows, "column_names", None)
    if known is not None:
        return list(known)
    return list(dict.fromkeys(name for row in (rows if hasattr(rows, "__len__") else islice(rows, 1)) for name in row))


def detect_kind(
    columns: Iterable[str],
    first_row: Mapping[str, Any] | None = None,
    *,
    allowed: Collection[Kind] = tuple(Kind),
    text_field: str = "text",
) -> Kind:
    """Tell what a data set is by its columns.

    Args:
        columns: the column names.
        first_row: a row; when given, a `label` that is no truth value leaves prompt and completion what they are.
        allowed: the kinds to choose from. GRPO, for one, takes any data with a prompt as prompt-only.
        text_field: the column of plain text.

    Raises:
        DataError: naming the columns found, what the nearest allowed kind lacks, and the allowed sets.
    """
    names = list(columns)
    found = set(names)
    if text_field != "text" and text_field in found and Kind.LANGUAGE_MODELING in allowed:
        return Kind.LANGUAGE_MODELING  # asked for by name, whatever else there is
    for kind, needed in _COLUMNS:
        if kind not in allowed or not found.issuperset(needed):
            continue
        if kind is Kind.UNPAIRED and first_row is not None and not is_truth(first_row.get("label")):
            continue
        return kind
    options = [(kind, needed) for kind, needed in _COLUMNS if kind in allowed]
    # Of sets that lack equally much, the larger is nearer: it shares more columns with what was given.
    kind, nearest = max(options, key=lambda item: len(found.intersection(item[1])) / len(item[1]))
    missing = [name for name in nearest if name not in found]
    hint = f" Nearest is {kind}, which lacks {_join(missing)}." if 0 < len(missing) < len(nearest) else ""
    raise DataError(f"The data set has the columns {_join(names)}.{hint} Allowed: {_describe(allowed)}.")


def require(kind: Kind, allowed: Collection[Kind]) -> None:
    """Raise DataError when `kind` is not one of the `allowed`, naming the columns that each of those needs."""
    if kind not in allowed:
        raise DataError(f"The data set is {kind} data. Allowed: {_describe(allowed)}.")


def to_conversation(row: Mapping[str, Any], index: int, kind: Kind) -> Conversation:
    """Read a row as a chat with typed parts, its images and videos matched to their places.

    A string prompt is a user turn, a string completion an assistant turn. Where a row has images or videos and nothing
    says where they go, they are put in front of the first user turn; `<image>` in the text of a row with images is a
    place, and so is `<video>` in that of a row with videos.

    Args:
        row: the row, its images and videos not decoded.
        index: the row's number, for errors.
        kind: MESSAGES, PROMPT_COMPLETION or PROMPT_ONLY.

    Raises:
        DataError: `row N: ...`, with the path of what is wrong and what is expected there.
    """
    chat = "conversations" if row.get("messages") is None and row.get("conversations") is not None else "messages"
    if kind is Kind.PROMPT_COMPLETION and row.get("prompt") is None and row.get(chat) is not None:
        kind = Kind.MESSAGES  # a row of a mixture of both kinds
    if kind is Kind.MESSAGES:
        return read_conversation(row, index, None, chat)
    if kind is Kind.PROMPT_COMPLETION:
        return read_conversation(row, index, "prompt", "completion")
    if kind is Kind.PROMPT_ONLY:
        return read_conversation(row, index, "prompt", None)
    raise DataError(f"row {index}: {kind} data is not one conversation; a chat is read from {_describe(_CHATS)}")


@dataclass(frozen=True)
class CheckReport:
    """What `check_rows` found.

    Attributes:
        rows: how many rows were looked at.
        kept: the numbers of the rows that can be used, for `dataset.select`; None when every row can, or in a stream.
        bad: row number -> what is wrong with it.
        images: how many images were decoded.
        smallest: (width, height) of the decoded image with the fewest pixels; None without images.
        largest: (width, height) of the one with the most.
        videos: how many videos were opened.
        smallest_video: (width, height) of the opened video with the fewest pixels; None without videos.
        largest_video: (width, height) of the one with the most.
        warnings: what is odd about the rows together: copies, labels that are all alike.
    """

    rows: int
    kept: list[int] | None = None
    bad: dict[int, str] = field(default_factory=dict)
    images: int = 0
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    videos: int = 0
    smallest_video: tuple[int, int] | None = None
    largest_video: tuple[int, int] | None = None
    warnings: list[str] = field(default_factory=list)

    def summary(self, what: str, max_listed: int = 10) -> str:
        """What was found, in a line; rows that are left out are counted and listed below it, then what is odd."""
        used = self.rows - len(self.bad)
        whole = self.kept is None and not self.bad
        text = f"{what}: {used:,} rows" if whole else f"{what}: {used:,} of {self.rows:,} rows"
        if self.images:
            text += f", images of {_sizes(self.smallest, self.largest)}"
        if self.videos:
            text += f", videos of {_sizes(self.smallest_video, self.largest_video)}"
        if self.bad:
            listed = [f"  row {row}: {reason}" for row, reason in list(self.bad.items())[:max_listed]]
            more = [f"  and {len(self.bad) - max_listed:,} more"] if len(self.bad) > max_listed else []
            text = "\n".join([f"{text}; {len(self.bad):,} left out:", *listed, *more])
        return "\n".join([text, *(f"  note: {warning}" for warning in self.warnings)])


def _sizes(smallest: tuple[int, int], largest: tuple[int, int]) -> str:
    return " to ".join(f"{width}×{height}" for width, height in dict.fromkeys([smallest, largest]))


def check_rows(
    dataset: Any,
    kind: Kind,
    *,
    on_bad_row: str = "error",
    check_images: int = 0,
    what: str = "train",
    max_listed: int = 10,
    text_field: str = "text",
) -> CheckReport:
    """Check the structure of every row, decode the images of the first ones and open their videos.

    Args:
        dataset: a `datasets.Dataset`, a list of rows, or a stream, of which the first 100 rows are checked.
        kind: what the rows are, see `detect_kind`.
        on_bad_row: "error" raises on any bad row; "skip" reports the rows that can be used.
        check_images: in how many leading rows the images are decoded, and the first frame of each video; the others
            are first decoded when they are used.
        what: the name of the data, for errors.
        max_listed: how many bad rows an error lists.
        text_field: the column of plain text.

    Raises:
        DataError: no rows; bad rows with "error"; no row that can be used.
        UserError: `on_bad_row` is neither.
    """
    if on_bad_row not in ("error", "skip"):
        raise UserError(f"on_bad_row is {on_bad_row!r}; allowed: error, skip.")
    dataset = undecoded(dataset)
    streamed = not hasattr(dataset, "__len__")
    if streamed:
        dataset = list(islice(dataset, STREAMED_ROWS_CHECKED))
    bad: dict[int, str] = {}
    rows, census = 0, Census(text_field)
    for rows, row in enumerate(iterate_light(dataset), start=1):
        try:
            _media_of(row, rows - 1, kind, text_field)
            census.add(row)
        except DataError as error:
            bad[rows - 1] = _reason(error)
    if not rows:
        raise DataError(f"The {what} data is empty: it has no rows.")
    sizes, video_sizes = _decode_first(dataset, kind, min(check_images, rows), bad)
    if bad and (on_bad_row == "error" or len(bad) == rows):
        raise DataError(describe_bad(bad, rows, what, max_listed, skipping=on_bad_row == "skip"))
    return CheckReport(
        rows=rows,
        kept=[index for index in range(rows) if index not in bad] if bad and not streamed else None,
        bad=dict(sorted(bad.items())),
        images=len(sizes),
        smallest=min(sizes, key=_pixels, default=None),
        largest=max(sizes, key=_pixels, default=None),
        videos=len(video_sizes),
        smallest_video=min(video_sizes, key=_pixels, default=None),
        largest_video=max(video_sizes, key=_pixels, default=None),
        warnings=census.warnings(),
    )


def _pixels(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _media_of(row: Mapping[str, Any], index: int, kind: Kind, text_field: str = "text") -> tuple[list[Any], list[Any]]:
    """Check one row's structure; returns its images and its videos, undecoded."""
    if kind is Kind.LANGUAGE_MODELING:
        check_text(row, index, text_field)
        return media(row, "image"), media(row, "video")
    if kind is Kind.TOKENS:
        check_tokens(row, index)
        return [], []
    if kind in _CHATS:
        conversation = to_conversation(row, index, kind)
    else:
        check = {Kind.PREFERENCE: check_pair, Kind.UNPAIRED: check_unpaired, Kind.STEPWISE: check_steps}[kind]
        conversation = check(row, index)
    return conversation.images, conversation.videos


def _decode_first(
    dataset: Any, kind: Kind, count: int, bad: dict[int, str]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Decode the images of the first `count` rows and open their videos, adding what fails to `bad`.

    Returns the images' sizes, and the videos'.
    """

    def decode(index: int, found: tuple[list[Any], list[Any]]) -> list[list[tuple[int, int]]]:
        images, videos = found
        try:
            return [
                [decode_image(image, row=index).size for image in images],
                [video_size(video, row=index) for video in videos],
            ]
        except DataError as error:
            bad[index] = _reason(error)
            return [[], []]

    sizes: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    indices = [index for index in range(count) if index not in bad]
    # In portions, so that no more than one portion's encoded images are in memory at a time.
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(indices), 64):
            portion = indices[start : start + 64]
            found = [_media_of(dataset[index], index, kind) for index in portion]
            for of_row in pool.map(decode, portion, found):
                for known, new in zip(sizes, of_row, strict=True):
                    known += new
    return sizes


def describe_bad(bad: Mapping[int, str], rows: int, what: str, max_listed: int = 10, *, skipping: bool) -> str:
    """The message of an error about bad rows, row number -> reason, the first of them listed."""
    lines = [f"  row {index}: {bad[index]}" for index in sorted(bad)[:max_listed]]
    if len(bad) > max_listed:
        lines.append(f"  ... and {len(bad) - max_listed} more")
    advice = "No row is left to use." if skipping else "Mend them, or leave them out with on_bad_row=skip."
    return f"{len(bad)} of {rows} rows of the {what} data cannot be used:\n" + "\n".join(lines) + f"\n{advice}"


def _reason(error: DataError) -> str:
    return str(error).split(": ", 1)[1]


def _join(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "(none)"


def _describe(kinds: Collection[Kind]) -> str:
    return "; ".join(f"{kind} ({_join(needed)})" for kind, needed in _COLUMNS if kind in kinds)
