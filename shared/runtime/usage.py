"""The help text, made from the options' own declarations."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

from shared.runtime.options import NO_DEFAULT, Option, choices

INDENT = " " * 6
NOTES = """\
Names may be written with - or _. Lists take several words. On/off options: --name, --no_name, --name true|false.
The command line goes before the YAML file of --config, whose keys are the same names."""


def format_help(sections: Sequence[tuple[str, dict[str, Option]]], prog: str, description: str | None) -> str:
    """The whole help text: one section a group, with each option's type, default and help."""
    width = min(shutil.get_terminal_size().columns, 110)
    parts = [f"usage: {prog} [--config run.yaml] [--option value ...]"]
    if description:
        parts.append(textwrap.dedent(description).strip())
    parts.append(textwrap.indent(NOTES, "  "))
    for title, options in sections:
        entries = "\n".join(_entry(option, width) for option in options.values())
        parts.append(f"{title}\n{entries}" if entries else title)
    return "\n\n".join(parts)


def _entry(option: Option, width: int) -> str:
    default = "" if option.default is NO_DEFAULT else f"  [{_shown(option.default)}]"
    head = f"  --{option.name}" + (f" {_type(option)}" if _type(option) else "") + default
    lines = [head]
    values = choices((*option.kinds, *option.element_kinds))
    text = option.help.replace("%%", "%")  # as transformers writes it, for argparse
    if values:
        text += f" One of: {', '.join(map(str, values))}."
    # Names and paths stay whole: a broken one could not be copied.
    lines += textwrap.wrap(text, width - len(INDENT), break_long_words=False, break_on_hyphens=False)
    return f"\n{INDENT}".join(lines)


def _type(option: Option) -> str:
    names = {int: "INTEGER", float: "NUMBER", str: "TEXT", dict: "JSON"}
    of = option.element_kinds if option.is_list else option.kinds
    found = (["CHOICE"] if choices(of) else []) + [name for kind, name in names.items() if kind in of]
    text = "|".join(found)
    if option.is_list:
        return f"{text} ..."
    return f"[{text}]" if option.is_flag and text else text


def _shown(default: object) -> str:
    if isinstance(default, bool) or default is None:
        return str(default).lower()
    if isinstance(default, list):
        return " ".join(map(str, default)) or "none"
    return str(default) if default != "" else '""'
