"""The core that textalign, visionalign and diffusionalign stand on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

SUITE = "trialign"  # what a sibling package looks for: a stray folder named `shared` has no such mark


def lazy_exports(
    package: str, where: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose names are imported when used (PEP 562).

    Args:
        package: the package's `__name__`.
        where: exported name -> module that holds it.
    """

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(where[name]), name)

    return get, lambda: sorted(where), sorted(where)
