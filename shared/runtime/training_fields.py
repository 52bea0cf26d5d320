"""The fields of transformers.TrainingArguments, read from its source text.

Importing the class costs 6 to 8 s of processor time, which is too long to wait for `--help` or for the news that an
option is misspelt. The source says all that is needed: names, types, defaults, help and the enumerations' values.
Values are checked here as far as their types go; what must fit together is checked by the class itself.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

from shared.runtime.options import Option, alternatives

LIBRARY_DEFAULT = "set by transformers"  # shown where the default is computed when the library is imported


@cache
def training_options() -> dict[str, Option]:
    """Every field of TrainingArguments as an option, in the order of declaration.

    A type that no text can stand for (a configuration object) becomes `object`.
    """
    module = _module(_package_folder() / "training_args.py")
    fields = (node for node in module.classes["TrainingArguments"].body if _is_field(node))
    return {node.target.id: _read_field(node, module) for node in fields}


def _is_field(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and "ClassVar" not in ast.unparse(node.annotation)
    )


def _package_folder() -> Path:
    spec = importlib.util.find_spec("transformers")  # finds a top-level package without running it
    assert spec is not None and spec.origin is not None, "transformers is a dependency of this package"
    return Path(spec.origin).parent


class _Module:
    """A source file of the package: its classes, and the classes that it imports from its sisters."""

    def __init__(self, path: Path):
        self.path = path
        body = ast.parse(path.read_text(encoding="utf-8")).body
        self.classes = {node.name: node for node in body if isinstance(node, ast.ClassDef)}
        self.origins = {
            alias.asname or alias.name: node.module
            for node in body
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
            for alias in node.names
        }

    def enum_values(self, name: str) -> tuple[str, ...]:
        """The values of an enumeration by its class name; empty where it is none."""
        node = self.classes.get(name)
        if node is None and name in self.origins:
            sister = self.path.parent.joinpath(*self.origins[name].split(".")).with_suffix(".py")
            node = _module(sister).classes.get(name)
        if node is None or not any("Enum" in ast.unparse(base) for base in node.bases):
            return ()
        members = (item.value for item in node.body if isinstance(item, ast.Assign))
        return tuple(member.value for member in members if isinstance(member, ast.Constant))


@cache
def _module(path: Path) -> _Module:
    return _Module(path)


class _Names(dict):
    """Names as an annotation sees them: enumerations become Literal types, unknown classes `object`."""

    def __init__(self, module: _Module):
        super().__init__(Literal=Literal, Union=Union)
        self.module = module
        self.has_enum = False

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            return getattr(builtins, name)
        values = self.module.enum_values(name)
        self.has_enum = self.has_enum or bool(values)
        self[name] = Literal[values] if values else object
        return self[name]


def _read_field(node: ast.AnnAssign, module: _Module) -> Option:
    keywords: dict[str, ast.expr] = {}
    default: Any = None
    if isinstance(node.value, ast.Call):
        keywords = {item.arg: item.value for item in node.value.keywords if item.arg}
    elif node.value is not None:
        default = _literal(node.value, LIBRARY_DEFAULT)
    if "default" in keywords:
        default = _literal(keywords["default"], LIBRARY_DEFAULT)
    elif "default_factory" in keywords:
        default = {"list": [], "dict": {}}.get(ast.unparse(keywords["default_factory"]), LIBRARY_DEFAULT)
    metadata = _metadata(keywords.get("metadata"))
    annotation = _annotation(node.annotation, module, metadata)
    return Option(node.target.id, annotation, default, " ".join(str(metadata.get("help", "")).split()))


def _metadata(node: ast.expr | None) -> dict[str, Any]:
    if not isinstance(node, ast.Dict):
        return {}
    pairs = zip(node.keys, node.values, strict=True)
    return {str(_literal(key, "")): _literal(value, None) for key, value in pairs if key is not None}


def _annotation(node: ast.expr, module: _Module, metadata: dict[str, Any]) -> Any:
    """The field's type: an enumeration (or `choices`) takes the place of the `str` beside it."""
    names = _Names(module)
    kinds = list(alternatives(eval(ast.unparse(node), {}, names)))  # an installed library's own annotation
    if names.has_enum and str in kinds:
        kinds.remove(str)
    if isinstance(metadata.get("choices"), list):
        kinds = [Literal[tuple(metadata["choices"])] if kind is str else kind for kind in kinds]
    if metadata.get("const") is True:  # `--name` alone is allowed and means True
        kinds.append(bool)
    return Union[tuple(kinds)]  # noqa: UP007 - the members are known only now


def _literal(node: ast.expr, otherwise: Any) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return otherwise
