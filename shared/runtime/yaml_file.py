"""A flat YAML file of options: keys and words with their line numbers, not yet of any type.

Plain scalars stay the words that they are written as. YAML 1.1 would make `1e-5` a string, `no` a truth value and
`2024-01-01` a date; here the option's type decides. Only a mapping that is an option's value is read as YAML reads it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shared.errors import UserError


class YamlError(UserError):
    """The file cannot be read, or is no flat mapping of option names to values."""


@dataclass(frozen=True)
class Entry:
    """One line of the file.

    Args:
        key: the option's name as written.
        value: a word, a list of words, a mapping, or None for an empty value.
        line: where the key stands, from 1.
    """

    key: str
    value: str | list[str] | dict[str, Any] | None
    line: int


class _Loader(yaml.SafeLoader):
    """SafeLoader that knows `1e-5` as a number, as YAML 1.2 does."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: str) -> list[Entry]:
    """The entries of the file, in order; repeated keys are all there.

    Raises:
        YamlError: the file is missing, is not valid YAML, or is not a flat mapping.
    """
    try:
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise YamlError(f"{path}: must be a mapping of option names to values (`name: value` on each line)")
        return [
            Entry(str(key.value), _value(value, loader, path), key.start_mark.line + 1) for key, value in root.value
        ]
    except OSError as error:
        raise YamlError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise YamlError(f"{path}: not a text file in UTF-8") from error
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise YamlError(f"{path}{place}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise YamlError(f"{path}: not valid YAML: {error}") from error


def _value(node: yaml.Node, loader: _Loader, path: str) -> str | list[str] | dict[str, Any] | None:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        if not all(isinstance(item, yaml.ScalarNode) for item in node.value):
            raise YamlError(f"{path}, line {node.start_mark.line + 1}: a list must hold plain values")
        return [item.value for item in node.value]
    empty = not node.style and node.value in ("", "~")
    return None if empty else node.value
