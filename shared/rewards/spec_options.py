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


def endpoint_of(spec: str, prefix: str) -> tuple[str, str, dict[str, Any]]:
    """Address, model and more arguments of a judge that is named `PREFIX URL|MODEL|name=value`.

    Raises:
        UserError: there is no model, or an argument is no name=value.
    """
    url, *rest = (part.strip() for part in spec.removeprefix(prefix).split("|"))
    if not rest or not rest[0]:
        raise UserError(f"reward {spec!r}: expected {prefix}URL|MODEL, and more arguments as |name=value.")
    options = spec_options(spec, rest[1:])
    if taken := {"base_url", "model"} & options.keys():
        raise UserError(f"reward {prefix}URL|MODEL: {min(taken)} is given twice.")
    return url, rest[0], options


def _literal(text: str) -> Any:
    """A number, truth or None as Python writes it; anything else is text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
