"""Files that a library writes, compared without its version."""

import json
from pathlib import Path
from typing import Any

VERSIONS = ("transformers_version", "_diffusers_version")


def content(path: Path) -> Any:
    """What a file says; of JSON without the version of the library that wrote it."""
    text = path.read_text(encoding="utf-8")
    return _plain(json.loads(text)) if path.suffix == ".json" else text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items() if name not in VERSIONS}
    return [_plain(each) for each in value] if isinstance(value, list) else value
