"""One strict parser for the command line and YAML files.

Nothing is guessed: an unknown name, a word that does not fit its option's type, an option given twice or a stray word
is an error, before any heavy library is imported. All errors of a command are told at once. There are no abbreviations
and no positional arguments.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from shared.errors import UserError
from shared.runtime.options import BadValue, Option, class_options, closest
from shared.runtime.training_fields import training_options
from shared.runtime.usage import format_help
from shared.runtime.yaml_file import YamlError, read_yaml
from shared.secrets import is_secret

COMMAND_LINE = "command line"
IGNORED = ("local_rank",)  # older launchers add it; the environment says the same
OPTION_WORD = re.compile(r"--[A-Za-z]|-h$")

Group = TypeVar("Group")


class OptionError(UserError):
    """Something is wrong with the options given; one line for each fault."""


@dataclass
class Parsed:
    """What the user asked for.

    Args:
        groups: the names of each group's options.
        values: name → value of everything that was given: on the command line, in the YAML file or by the recipe.
        sources: name → "command line" or the path of the file that gave it.
    """

    groups: dict[type, list[str]]
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def build(self, group: type, into: type[Group] | None = None) -> Any:
        """The group's dataclass, or another class that takes its options, filled with the given values.

        Raises:
            UserError: the class refuses the values.
        """
        given = {name: self.values[name] for name in self.groups[group] if name in self.values}
        try:
            return (into or group)(**given)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error)) from error

    def to_yaml(self) -> str:
        """Everything that was given as YAML that `--config` takes. Access tokens and passwords are left out."""
        shown = _without_secrets(self.values)
        for once in ("resume_from_checkpoint", "overwrite_output_dir"):  # said of this start, not of the run
            shown.pop(once, None)
        return yaml.safe_dump(shown, sort_keys=False, allow_unicode=True) if shown else ""


def _without_secrets(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: _without_secrets(item) for name, item in value.items() if not is_secret(str(name))}


@dataclass
class _Given:
    """One option as it was written: `label` names it in messages, `raw` is what `Option.convert` takes."""

    name: str
    raw: Any
    label: str
    source: str


def parse_arguments(
    groups: Sequence[type],
    argv: Sequence[str] | None = None,
    *,
    prog: str | None = None,
    description: str | None = None,
    recipe: Callable[[dict[str, Any]], Path | None] | None = None,
) -> Parsed:
    """Read the options of several dataclasses from the command line and from the YAML file that `--config` names.

    The command line goes before the YAML file, and that before the recipe.

    Args:
        groups: dataclasses made of `option` fields. One with a true `training_arguments` brings all fields of
            transformers.TrainingArguments with it; its own fields go before those.
        argv: the words; those of this process where None.
        prog: the command's name in the help text.
        description: what the command does, for the help text.
        recipe: called with the values that were given; may return a YAML file with defaults below them.

    Raises:
        OptionError: one line for each fault.
        SystemExit: after `--help`, with status 0.
    """
    sections = _sections(groups)
    known = {name: option for _, options in sections for name, option in options.items()}
    aliases = {name: own for group in groups for name, own in getattr(group, "aliases", {}).items()}
    words = list(sys.argv[1:] if argv is None else argv)
    if "--help" in words or "-h" in words:
        if os.environ.get("RANK", "0") == "0":
            print(format_help(sections, prog or os.path.basename(sys.argv[0]), description))
        raise SystemExit(0)

    errors: list[str] = []
    line, config = _read_command_line(words, known, aliases, errors)
    given = {item.name: item for item in _read_file(config, known, aliases, errors)} if config else {}
    given |= {item.name: item for item in line}
    values = _convert(given.values(), known, errors)
    _raise(errors)
    default_file = recipe(dict(values)) if recipe else None
    if default_file is not None:
        below = {
            item.name: item for item in _read_file(str(default_file), known, aliases, errors) if item.name not in given
        }
        values = _convert(below.values(), known, errors) | values
        given = below | given
    errors += _without_effect(given, known)
    _raise(errors)
    names = {group: _names(group, known) for group in groups}
    return Parsed(names, values, {name: item.source for name, item in given.items()})


def _sections(groups: Sequence[type]) -> list[tuple[str, dict[str, Option]]]:
    sections = [((group.__doc__ or group.__name__).strip().splitlines()[0], class_options(group)) for group in groups]
    own = [name for _, options in sections for name in options]
    assert len(own) == len(set(own)), "two groups declare an option of the same name"
    if any(getattr(group, "training_arguments", False) for group in groups):
        rest = {name: option for name, option in training_options().items() if name not in (*own, *IGNORED)}
        sections.append(("Training (transformers.TrainingArguments).", rest))
    return [(title, {n: o for n, o in options.items() if o.is_writable}) for title, options in sections]


def _names(group: type, known: dict[str, Option]) -> list[str]:
    names = list(class_options(group))
    if getattr(group, "training_arguments", False):
        names += [name for name in training_options() if name in known and name not in names]
    return names


def _raise(errors: list[str]) -> None:
    if errors:
        raise OptionError("\n".join(errors))


def _convert(given: Any, known: dict[str, Option], errors: list[str]) -> dict[str, Any]:
    values = {}
    for item in given:
        try:
            values[item.name] = known[item.name].convert(item.raw)
        except BadValue as error:
            quoted = item.source != COMMAND_LINE
            word = f": {error.word!r} is " if quoted else f" {error.word}: "
            errors.append(f"{item.label}{word if error.word else ': '}{error}")
    return values


def _without_effect(given: dict[str, _Given], known: dict[str, Option]) -> Iterator[str]:
    """Options whose switch was never mentioned and is not on by itself. One that is turned off by name is meant so."""
    for item in given.values():
        switch = known[item.name].needs
        if switch and switch not in given and known[switch].default is not True:
            unused = f", or --no_{switch} to keep it unused" if known[switch].annotation is bool else ""
            yield f"{item.label}: has no effect without {switch}. Add --{switch}{unused}"


@dataclass
class _Written:
    word: str  # as written, without a value behind "="
    name: str
    values: list[str]


def _split(words: Sequence[str], errors: list[str]) -> list[_Written]:
    """Each option with the words behind it."""
    written: list[_Written] = []
    for word in words:
        if OPTION_WORD.match(word):
            name, equals, value = word.partition("=")
            written.append(_Written(name, name[2:].replace("-", "_"), [value] if equals else []))
        elif written:
            written[-1].values.append(word)
        else:
            errors.append(_stray(word))
    return written


def _stray(word: str) -> str:
    return f"{word}: stray word. Options are written --name value (--help lists all)"


def _read_command_line(
    words: Sequence[str], known: dict[str, Option], aliases: dict[str, str], errors: list[str]
) -> tuple[list[_Given], str | None]:
    found: dict[str, _Given] = {}
    config: str | None = None
    for item in _split(words, errors):
        if item.name in IGNORED:
            continue
        item.name = aliases.get(item.name, item.name)
        negated = item.name not in known and item.name.startswith("no_") and item.name[3:] in known
        name = item.name[3:] if negated else item.name
        if name == "config":
            errors += [] if len(item.values) == 1 and config is None else ["--config: give one YAML file"]
            config = item.values[0] if item.values else None
        elif name not in known or (negated and not known[name].is_flag):
            errors.append(_unknown(item, known))
        elif name in found and not (known[name].is_list and not negated):
            errors.append(f"{item.word}: given twice")
        else:
            raw = _raw(item, known[name], negated, errors)
            if name in found and raw is not None:
                before, now = found[name].raw, raw
                raw = [*([before] if isinstance(before, str) else before), *([now] if isinstance(now, str) else now)]
            if raw is not None:
                found[name] = _Given(name, raw, f"--{name}", COMMAND_LINE)
    return list(found.values()), config


def _raw(item: _Written, option: Option, negated: bool, errors: list[str]) -> str | list[str] | None:
    """The words that belong to the option; None after an error."""
    if negated:
        errors += [f"{item.word}: takes no value, but {' '.join(item.values)} was given"] if item.values else []
        return "false"
    if not item.values:
        if option.is_flag:
            return "true"
        errors.append(f"{item.word}: needs a value")
        return None
    if len(item.values) > 1 and not option.is_list:
        errors += [_stray(word) for word in item.values[1:]]
    return item.values if option.is_list and len(item.values) > 1 else item.values[0]


def _unknown(item: _Written, known: dict[str, Option]) -> str:
    negated = [f"no_{name}" for name, option in known.items() if option.is_flag and item.name.startswith("no_")]
    meant = closest(item.name, [*known, *negated, "config", "help"])
    return f"{item.word}: unknown option." + (f" Did you mean --{meant}?" if meant else "") + " (--help lists all)"


def _read_file(path: str, known: dict[str, Option], aliases: dict[str, str], errors: list[str]) -> list[_Given]:
    given: dict[str, _Given] = {}
    try:
        entries = read_yaml(path)
    except YamlError as error:
        errors.append(str(error))
        return []
    for entry in entries:
        name = entry.key.replace("-", "_")
        name = aliases.get(name, name)
        place = f"{path}, line {entry.line}: "
        if name not in known:
            meant = closest(name, known)
            errors.append(f"{place}{entry.key}: unknown option." + (f" Did you mean {meant}?" if meant else ""))
        elif name in given:
            errors.append(f"{place}{entry.key}: given twice")
        else:
            given[name] = _Given(name, entry.value, f"{place}{entry.key}", path)
    return list(given.values())
