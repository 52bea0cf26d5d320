"""The arguments behind a reward's name: `NAME|name=value|name=value`."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from shared.errors import UserError


def spec_options(spec: str, parts: Sequence[str]) -> dict[str, Any]:
    """The arguments that a spec gives as `name=value`.

    Args:
        spec: as the user wrote it, for messages.
        parts: what stands between its bars.

    Raises:
        UserError: a part is something else.
    """
    options = {}
    for part in parts:
        name, given, value = part.partition("=")
        if not given or not name.strip().isidentifier():
            raise UserError(f"reward {spec!r}: {part!r} is no name=value.")
        options[name.strip()] = _literal(value.strip())
    return options


def _literal(text: str) -> Any:
    """A number, truth or None as Python writes it; anything else is text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
