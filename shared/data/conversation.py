"""One row as a chat with typed parts, and the images and videos that its parts show.

The public way in is `shared.data.schema.to_conversation`; which columns make which kind of data is decided there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.data.images import image_problem
from shared.data.videos import is_frames, video_problem
from shared.errors import DataError

IMAGE_COLUMNS = ("image", "images")
VIDEO_COLUMNS = ("video", "videos")
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function": "tool"}
_PART_TYPES = ("text", "image", "video")


@dataclass
class Conversation:
    """One row as a chat.

    Attributes:
        messages: `{"role", "content", ...}`; content is always a list of `{"type": "text", "text": str}`,
            `{"type": "image"}` and `{"type": "video"}`. Other keys of a message (`tool_calls`, `name`) are kept.
        images: what the image parts show, in their order: PIL images, paths, bytes or `{"bytes", "path"}`, undecoded.
        prompt_messages: how many leading messages are the prompt; None where the row makes no difference (messages).
        extras: the row's other columns, among them `tools` and `chat_template_kwargs`.
        row: the row's number in its data set, for errors.
        videos: what the video parts show, in their order: what `decode_video` takes, undecoded.

    Example:
        `{"prompt": "What colour?", "completion": "red", "image": "a.png", "kind": "colour"}` gives messages
        `[user: [image, text], assistant: [text]]`, images `["a.png"]`, prompt_messages 1, extras `{"kind": "colour"}`.
    """

    messages: list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)
    prompt_messages: int | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    row: int = 0
    videos: list[Any] = field(default_factory=list)


def read_conversation(row: Mapping[str, Any], index: int, prompt: str | None, answer: str | None) -> Conversation:
    """Read the chat in column `prompt` and then in column `answer`; either may be None, but not both.

    Raises:
        DataError: `row N: ...`, with the path of what is wrong and what is expected there.
    """
    images, videos = media(row, "image"), media(row, "video")
    marked = _markers(images, videos)
    messages = _turns(row.get(prompt), index, prompt, "user", marked) if prompt else []
    prompt_messages = len(messages) if prompt else None
    if answer:
        # A lone string says who speaks only in a column that is somebody's.
        role = None if answer in ("messages", "conversations") else "assistant"
        turns = _turns(row.get(answer), index, answer, role, marked)
        if not any(turn["role"] == "assistant" and _says(turn) for turn in turns):
            raise DataError(f"row {index}: {answer} has no assistant turn with content, so nothing to learn")
        messages += turns
    elif not images and not videos and not any(_says(turn) for turn in messages):
        raise DataError(f"row {index}: {prompt} is empty")
    read = {prompt, answer, *IMAGE_COLUMNS, *VIDEO_COLUMNS}
    return Conversation(
        messages,
        _place(messages, images, index, "image"),
        prompt_messages,
        {name: value for name, value in row.items() if name not in read},
        index,
        _place(messages, videos, index, "video"),
    )


def _markers(images: list[Any], videos: list[Any]) -> re.Pattern[str] | None:
    """What marks a place in the text of a row: markers of what the row does not have are text as any other."""
    kinds = [kind for kind, given in (("image", images), ("video", videos)) if given]
    return re.compile(f"<({'|'.join(kinds)})>") if kinds else None


def _turns(
    value: Any, index: int, column: str, role: str | None, marked: re.Pattern[str] | None
) -> list[dict[str, Any]]:
    """The messages in one column's value, their contents made typed parts; a string is what `role` says."""
    if isinstance(value, str) and role:
        return [{"role": role, "content": _text_parts(value, marked)}]
    if isinstance(value, str) or not isinstance(value, Sequence):
        expected = "a string or a list of messages" if role else "a list of messages"
        raise DataError(f"row {index}: {column} is {type_name(value)}, expected {expected}")
    if not value:
        raise DataError(f"row {index}: {column} is an empty list, expected at least one message")
    turns = []
    for position, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise DataError(
                f"row {index}: {column}[{position}] is {type_name(message)}, expected {{'role': ..., 'content': ...}}"
            )
        turn = {key: item for key, item in message.items() if item is not None}
        if "role" not in turn and "from" in turn:
            source = turn.pop("from")
            turn["role"] = _SHAREGPT_ROLES.get(source, source)
            turn["content"] = turn.pop("value", None)
        if turn.get("role") not in ROLES:
            raise DataError(
                f"row {index}: {column}[{position}].role is {turn.get('role')!r}, expected one of {', '.join(ROLES)}"
            )
        content = turn.get("content")
        if isinstance(content, str):
            turn["content"] = _text_parts(content, marked)
        elif content is None and "tool_calls" in turn:
            turn["content"] = []
        elif isinstance(content, Sequence):
            turn["content"] = [_part(part, index, column, position, place) for place, part in enumerate(content)]
        else:
            raise DataError(
                f"row {index}: {column}[{position}].content is {type_name(content)}, "
                "expected a string or a list of parts"
            )
        turns.append(turn)
    return turns


def _part(part: Any, index: int, column: str, message: int, place: int) -> dict[str, Any]:
    """A checked part: text, or an image or video that still carries its `source` or `index` for `_place`."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _PART_TYPES:
        found = f"has type {kind!r}" if isinstance(part, Mapping) else f"is {type_name(part)}"
        raise DataError(
            f"row {index}: {column}[{message}].content[{place}] {found}, "
            f"expected {{'type': ...}} with one of {', '.join(_PART_TYPES)}"
        )
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            path = f"{column}[{message}].content[{place}].text"
            raise DataError(f"row {index}: {path} is {type_name(text)}, expected str")
        return {"type": "text", "text": text}
    source = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
    return {"type": kind, "source": source, "index": part.get("index")}


def _text_parts(text: str, marked: re.Pattern[str] | None) -> list[dict[str, Any]]:
    pieces = marked.split(text) if marked else [text]
    if len(pieces) == 1:
        return [{"type": "text", "text": text}]
    parts: list[dict[str, Any]] = []
    for position, piece in enumerate(pieces):
        if position % 2:
            parts.append({"type": piece})
        elif piece.strip():
            # The line break beside a marker belongs to the marker, not to what is said.
            parts.append({"type": "text", "text": piece.strip("\n")})
    return parts


def _place(messages: list[dict[str, Any]], given: list[Any], index: int, kind: str) -> list[Any]:
    """Match the row's images (or videos) to the parts, adding parts where there are none.

    Returns what the parts show, in their order, and takes `source` and `index` off the parts.
    """
    parts = [part for turn in messages for part in turn["content"] if part["type"] == kind]
    if given and not parts:
        first = next((turn for turn in messages if turn["role"] == "user"), None)
        if first is None:
            raise DataError(f"row {index}: {_count(given, kind)} but no user turn to show them in")
        first["content"][:0] = parts = [{"type": kind} for _ in given]
    bare = [part for part in parts if part.get("source") is None]
    if len(bare) != len(given):
        raise DataError(
            f"row {index}: {_count(given, kind)} but {_count(bare, f'{kind} place')} in the messages; "
            f"give one {{'type': '{kind}'}} part for each {kind}, or none at all to put them before the first question"
        )
    order = [part.get("index") for part in bare]
    if set(order) == set(range(len(given))):
        given = [given[position] for position in order]
    queue = iter(given)
    placed = []
    for part in parts:
        source = part.pop("source", None)
        part.pop("index", None)
        placed.append(next(queue) if source is None else source)
    find_problem = image_problem if kind == "image" else video_problem
    for item in placed:
        problem = find_problem(item)
        if problem:
            raise DataError(f"row {index}: {problem}")
    return placed


def media(row: Mapping[str, Any], kind: str) -> list[Any]:
    """What a row has in its columns `kind` (one, or a list of them) and `kind`s (several), as one list.

    A list of image files in the column of one video is that video's frames.
    """
    single, several = row.get(kind), row.get(f"{kind}s")
    if kind == "video" and is_frames(single):
        single = [single]
    items = [] if single is None else list(single) if isinstance(single, (list, tuple)) else [single]
    if several is not None:
        items += several if isinstance(several, (list, tuple)) else [several]
    return items


def _says(turn: Mapping[str, Any]) -> bool:
    return "tool_calls" in turn or any(part["type"] != "text" or part["text"].strip() for part in turn["content"])


def type_name(value: Any) -> str:
    """How an error calls the type of `value`."""
    return "missing" if value is None else type(value).__name__


def _count(items: Sequence[Any], name: str) -> str:
    return f"{len(items)} {name}{'' if len(items) == 1 else 's'}"
