"""What a row gives its chat template besides messages: tools and variables, as lists and dicts or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from shared.data.conversation import type_name
from shared.errors import DataError


def row_tools(value: Any, number: int) -> list[dict[str, Any]] | None:
    """The functions that a row offers, without the empty places that a data set's columns give them.

    Args:
        value: a list of function descriptions, each a dict or its JSON, or the JSON of such a list.
        number: the row's, for errors.

    Raises:
        DataError: `row N: ...`, for anything else.
    """
    value = _parsed(value, "tools", number)
    if value is None:
        return None
    if not isinstance(value, (list, tuple)):
        raise DataError(f"row {number}: tools is {type_name(value)}, expected a list of functions")
    tools = [_parsed(tool, f"tools[{at}]", number) for at, tool in enumerate(value)]
    for at, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise DataError(
                f"row {number}: tools[{at}] is {type_name(tool)}, expected a function as a dict or as JSON"
            )
    return without_nones(tools) or None


def row_variables(value: Any, number: int) -> dict[str, Any]:
    """The template variables of a row's `chat_template_kwargs`: a dict, or its JSON.

    Raises:
        DataError: `row N: ...`, for anything else.
    """
    value = _parsed(value, "chat_template_kwargs", number)
    if value is not None and not isinstance(value, Mapping):
        raise DataError(f"row {number}: chat_template_kwargs is {type_name(value)}, expected a dict, or its JSON")
    return dict(value or {})


def without_nones(value: Any) -> Any:
    """A value without the empty places of its dicts, at any depth."""
    if isinstance(value, Mapping):
        return {name: without_nones(item) for name, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nones(item) for item in value]
    return value


def _parsed(value: Any, name: str, number: int) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise DataError(f"row {number}: {name} is no JSON: {error}") from error
