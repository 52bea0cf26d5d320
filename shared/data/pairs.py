"""Preference rows: where the prompt ends and the two answers begin, however the row gives them."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from typing import Any

from shared.data.conversation import Conversation, read_conversation, type_name
from shared.errors import DataError


def read_pair(row: Mapping[str, Any], index: int) -> tuple[Conversation, Conversation]:
    """The chats of a preference row: prompt with chosen, prompt with rejected.

    Raises:
        DataError: `row N: ...`, with the path of what is wrong and what is expected there.
    """
    prompt, chosen, rejected = split_pair(row, index)
    whole = {**row, "prompt": prompt, "chosen": chosen, "rejected": rejected}
    return read_conversation(whole, index, "prompt", "chosen"), read_conversation(whole, index, "prompt", "rejected")


def split_pair(row: Mapping[str, Any], index: int) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of a preference row, each without what belongs to another.

    Without a prompt, the prompt is what chosen and rejected begin with alike: leading messages, or text up to the end
    of a word. Lists of messages that begin with the prompt, as whole conversations do, lose it.

    Raises:
        DataError: no two strings or two lists; nothing shared; a conversation that does not begin with its prompt.
    """
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    lists = isinstance(chosen, (list, tuple)) and isinstance(rejected, (list, tuple))
    if not lists and not (isinstance(chosen, str) and isinstance(rejected, str)):
        kinds = " and ".join(f"{name} is {type_name(row.get(name))}" for name in ("chosen", "rejected"))
        raise DataError(f"row {index}: {kinds}, expected two strings or two lists of messages")
    if not lists:
        if prompt is None:
            end = _shared_text(chosen, rejected)
            return chosen[:end], chosen[end:], rejected[end:]
        return prompt, chosen, rejected
    if not chosen or not rejected:
        name = "rejected" if chosen else "chosen"
        raise DataError(f"row {index}: {name} is an empty list, expected at least one message")
    if prompt is None:
        count = _shared_messages(chosen, rejected)
        if not count:
            raise DataError(f"row {index}: has no prompt, and chosen and rejected begin with no message alike")
        return list(chosen[:count]), list(chosen[count:]), list(rejected[count:])
    if _role(chosen[0]) in ("assistant", "tool") and _role(rejected[0]) in ("assistant", "tool"):
        return prompt, chosen, rejected
    if isinstance(prompt, str):
        count = _shared_messages(chosen, rejected)
        if not any(_said(message) == prompt.strip() for message in chosen[:count]):
            _not_a_prefix(index, chosen, rejected)
        return list(chosen[:count]), list(chosen[count:]), list(rejected[count:])
    count = len(prompt)
    alike = all(
        len(answer) > count and all(_alike(own, given) for own, given in zip(answer[:count], prompt, strict=True))
        for answer in (chosen, rejected)
    )
    if not alike:
        _not_a_prefix(index, chosen, rejected)
    return prompt, list(chosen[count:]), list(rejected[count:])


def _not_a_prefix(index: int, chosen: Any, rejected: Any) -> None:
    begin = " and ".join(
        f"{name} begins with a message of {_role(answer[0])!r}"
        for name, answer in (("chosen", chosen), ("rejected", rejected))
    )
    raise DataError(
        f"row {index}: {begin}, but the prompt is not how both begin. Give the answers alone (from the assistant's "
        "turn on), or in both the whole conversation, its first messages exactly those of the prompt."
    )


def _shared_messages(chosen: Any, rejected: Any) -> int:
    """How many leading messages both have, before a turn of the assistant in each."""
    most = min(len(chosen), len(rejected)) - 1
    count = 0
    while count < most and _alike(chosen[count], rejected[count]):
        count += 1
    while count and not _role(chosen[count]) == _role(rejected[count]) == "assistant":
        count -= 1
    return count


def _shared_text(chosen: str, rejected: str) -> int:
    """How many leading characters both have, without a word that only one of them may go on with."""
    end = len(os.path.commonprefix([chosen, rejected]))
    follows = chosen[end : end + 1] + rejected[end : end + 1]
    if any(map(str.isalnum, follows)) or end in (len(chosen), len(rejected)):
        while end and chosen[end - 1].isalnum():
            end -= 1
    if end and chosen[end - 1] == " ":  # most tokenizers write a word with the space before it
        end -= 1
    return end


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        kept, others = ({k: v for k, v in message.items() if v is not None} for message in (one, other))
        return kept.keys() == others.keys() and all(_alike(value, others[name]) for name, value in kept.items())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if hasattr(one, "shape") or hasattr(other, "shape"):  # the frames of a video
        import numpy as np

        return np.array_equal(one, other)
    return one == other


def _role(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return None
    if message.get("role") is None and "from" in message:
        return {"human": "user", "gpt": "assistant"}.get(message["from"], message["from"])
    return message.get("role")


def _said(message: Any) -> str | None:
    content = message.get("content", message.get("value")) if isinstance(message, Mapping) else None
    return content.strip() if isinstance(content, str) else None
