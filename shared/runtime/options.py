"""One option: its name, type, default and help, and how written words become a value of its type.

A word on the command line and a plain scalar in a YAML file are read by the same rules, so that `1e-5` is a number and
`no` is a choice in both. Nothing is guessed from the look of a word: the option's type alone decides.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

NONE_WORDS = ("none", "null")
TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
NO_DEFAULT = dataclasses.MISSING


class BadValue(ValueError):
    """A word that does not fit an option's type. `word` is what was given, the message completes "it is …"."""

    def __init__(self, word: str, message: str):
        super().__init__(message)
        self.word = word


def option(default: Any, help: str, *, needs: str | None = None) -> Any:
    """Declare an option as a dataclass field.

    Args:
        default: the value where nothing is given; a list or dict is copied for every instance.
        help: one or two sentences; shown by --help.
        needs: name of the option without which this one has no effect. Giving this one alone is an error.
    """
    metadata = {"help": help, "needs": needs}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """What is known of one option.

    Args:
        name: with underscores, no dashes in front.
        annotation: its type: bool, int, float, str, Literal, list[…], dict, None and unions of these. Other types
            have no written form; an option that has no kind but them is not offered.
        default: shown by --help only; the dataclass applies it.
        help: one or two sentences.
        needs: see `option`.
    """

    name: str
    annotation: Any
    default: Any = NO_DEFAULT
    help: str = ""
    needs: str | None = None

    @cached_property
    def kinds(self) -> tuple[Any, ...]:
        """The alternatives of the type: plain classes (list and dict without their arguments) and Literal types."""
        plain = (_plain(kind) for kind in alternatives(self.annotation))
        return tuple(kind for kind in plain if kind is not object)

    @cached_property
    def element_kinds(self) -> tuple[Any, ...]:
        """The alternatives of a list's element type; empty where the option takes no list."""
        for kind in alternatives(self.annotation):
            if _plain(kind) is list:
                return alternatives((get_args(kind) or (str,))[0])
        return ()

    @property
    def is_writable(self) -> bool:
        """Whether a value can be given as text."""
        return any(kind is not type(None) for kind in self.kinds)

    @property
    def is_flag(self) -> bool:
        """Whether `--name` alone means true."""
        return bool in self.kinds

    @property
    def is_list(self) -> bool:
        return list in self.kinds

    @property
    def is_dict(self) -> bool:
        return dict in self.kinds

    def convert(self, given: str | list[str] | dict[str, Any] | None) -> Any:
        """The value that the written word, words or mapping stands for.

        Raises:
            BadValue: it does not fit the type.
        """
        if given is None or (
            isinstance(given, str)
            and given.lower() in NONE_WORDS
            and type(None) in self.kinds
            and given not in choices(self.kinds)
        ):
            if type(None) in self.kinds:
                return None
            raise BadValue("", f"empty, but must be {describe(self.kinds)}")
        if isinstance(given, dict):
            if not self.is_dict:
                raise BadValue("{…}", f"a mapping, but must be {describe(self.kinds)} (options are not nested)")
            return given
        if isinstance(given, list):
            if not self.is_list:
                raise BadValue(" ".join(map(str, given)), f"several values, but must be {describe(self.kinds)}")
            return [_convert_word(self.element_kinds, word) for word in given]
        if self.is_list and str not in self.kinds:
            return [_convert_word(self.element_kinds, given)]
        return _convert_word(self.kinds, given)


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def choices(kinds: Iterable[Any]) -> tuple[Any, ...]:
    """The values that the Literal types among these name."""
    return tuple(value for kind in kinds if get_origin(kind) is Literal for value in get_args(kind))


def describe(kinds: Iterable[Any]) -> str:
    """The types in a user's words: "one of a, b", "true or false", "a whole number", …"""
    kinds = tuple(kinds)
    words = {bool: "true or false", int: "a whole number", float: "a number", dict: "a JSON object", str: "text"}
    words |= {list: "a list"}
    named = [f"one of {', '.join(str(value) for value in choices(kinds))}"] if choices(kinds) else []
    return " or ".join(named + [text for kind, text in words.items() if kind in kinds])


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that was probably meant, or None."""
    by_lower = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def class_options(group: type) -> dict[str, Option]:
    """The options that a dataclass declares, in order."""
    hints = get_type_hints(group)
    found = {}
    for item in dataclasses.fields(group):
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        help_text, needs = item.metadata.get("help", ""), item.metadata.get("needs")
        found[item.name] = Option(item.name, hints[item.name], default, help_text, needs)
    return found


def _plain(kind: Any) -> Any:
    if get_origin(kind) is Literal or kind in (bool, int, float, str, list, dict, type(None)):
        return kind
    origin = get_origin(kind)
    return origin if origin in (list, dict) else object


def _convert_word(kinds: tuple[Any, ...], word: str) -> Any:
    named, lowered = choices(kinds), word.lower()
    for value in named:
        if word == value or (not isinstance(value, str) and lowered == str(value).lower()):
            return value
    if bool in kinds:
        count = 1 if str in kinds else None  # where any text may stand, "no" and "1" are text
        if lowered in TRUE_WORDS[:count] + FALSE_WORDS[:count]:
            return lowered in TRUE_WORDS
    if int in kinds and re.fullmatch(r"[+-]?\d+(_\d+)*", word):
        return int(word)
    if float in kinds and (number := _number(word)) is not None:
        return number
    if dict in kinds and (word.startswith("{") or str not in kinds):
        return _json_object(word)
    if str in kinds:
        return word
    meant = closest(word, [value for value in named if isinstance(value, str)])
    raise BadValue(word, f"not {describe(kinds)}" + (f". Did you mean {meant}?" if meant else ""))


def _number(word: str) -> float | None:
    try:
        number = float(word)
    except ValueError:
        return None
    return None if math.isnan(number) else number


def _json_object(word: str) -> dict[str, Any]:
    try:
        value = json.loads(word)
    except json.JSONDecodeError as error:
        raise BadValue(word, f"not a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise BadValue(word, 'not a JSON object such as {"key": 1}')
    return value
