"""A command's help, on one screen: what it takes, an example, and the recipe's keys with their defaults."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from ray_jobs.recipe import ArmConfig, Recipe
from ray_jobs.recipe_file import is_section

if TYPE_CHECKING:
    from ray_jobs._options import Command, Option

_WIDTH = 120
_TOP = "(no section)"
_ARM = "arms.NAME"


@dataclass(frozen=True)
class _Key:
    """One key of a recipe: `section` is empty for those at the top, `about` comes from the dataclass' docstring."""

    section: str
    name: str
    default: str
    about: str

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.name}".lstrip(".")


def asked_for(command: Command, argv: list[str]) -> str:
    """The help that `argv` asks for; empty when it asks for none."""
    if "--help-all" in argv:
        return f"{page(command)}\n\n{_explained(_keys(command))}"
    if "-h" in argv or "--help" in argv:
        return page(command)
    for word in argv:
        section = word.removeprefix("--").removesuffix(".help")
        if word == f"--{section}.help" and is_section(section):
            return _explained([key for key in _keys(command) if key.dotted.startswith(f"{section}.")])
    return ""


def page(command: Command) -> str:
    """What `captune COMMAND --help` prints."""
    options = _shown(command)
    first = next((option for option in options if option.name == command.first), None)
    words = f" {first.value}{' ...' if first.many else ''}" if first else ""
    parts = [f"usage: captune {command.name}{words} [options]", textwrap.fill(command.about, _WIDTH)]
    parts.append(_columns([_row(option, option is first) for option in options]))
    parts.append(f"example:\n  {command.example}")
    if keys := _keys(command):
        shown = [key for key in keys if not _as_in_refine(key, keys)]
        rows = [
            (name or _TOP, " ".join(f"{key.name}={_short(key.default)}" for key in shown if key.section == name))
            for name in dict.fromkeys(key.section for key in shown)
        ]
        rows = [(name, f"as refine, and {what}" if name == _ARM else what) for name, what in rows]
        title = f"keys of a recipe with their defaults; each is an option, too, as --{keys[-1].dotted}"
        parts.append(f"{title} (--help-all explains them):\n{_columns(rows)}")
    return "\n\n".join(parts)


def _as_in_refine(key: _Key, keys: list[_Key]) -> bool:
    """An arm's key that the section refine has shown already."""
    twin = f"refine{key.dotted.removeprefix(_ARM)}"
    return key.section.startswith(_ARM) and any(each.dotted == twin and each.default == key.default for each in keys)


def _shown(command: Command) -> list[Option]:
    """Options worth a line: `--config` not where nothing is read from it, nor where another name says the same."""
    files = [option for option in command.every_option() if option.key == "config"]
    hidden = files if not command.reads else files[1:]
    return [option for option in command.every_option() if option not in hidden]


def _row(option: Option, first: bool) -> tuple[str, str]:
    """An option as two columns: what to type, and what it does."""
    what = option.about
    if option.choices:
        what += f": {', '.join(option.choices)}"
    if option.default not in (None, ""):
        what += f" (default {option.default})"
    if option.key and option.key != "config":
        what += f"; in a recipe {option.key}"
    typed = f"{option.name} {option.value}".strip()
    return f"{option.value}, or {typed}" if first else typed, what


def _explained(keys: list[_Key]) -> str:
    return _columns([(f"--{key.dotted} {_short(key.default)}", key.about) for key in keys])


def _keys(command: Command) -> list[_Key]:
    """The recipe's keys that the command uses, without those that its own options are other names of."""
    own = {option.key for option in command.options}
    return [key for key in _keys_of(Recipe(), "") if command.uses(key.dotted) and key.dotted not in own]


def _keys_of(section: Any, prefix: str) -> Iterator[_Key]:
    """Keys in the order of the dataclass, those directly in it first."""
    abouts = _abouts(type(section))
    within: list[tuple[Any, str]] = []
    for key in fields(section):
        value = getattr(section, key.name)
        if not prefix and key.name == "arms":
            within.append((ArmConfig(), _ARM))
        elif is_dataclass(value):
            within.append((value, f"{prefix}.{key.name}".lstrip(".")))
        else:
            yield _Key(prefix, key.name, _text(value), abouts.get(key.name, ""))
    for inner, name in within:
        yield from _keys_of(inner, name)


def _abouts(section: type) -> dict[str, str]:
    """Key -> its line under `Attributes:` in the docstring of the dataclass or of those that it extends."""
    from docstring_parser import parse

    found: dict[str, str] = {}
    for kind in reversed(section.__mro__):
        for param in parse(kind.__doc__ or "").params:
            found |= {name: " ".join((param.description or "").split()) for name in param.arg_name.split(", ")}
    return found


def _text(value: Any) -> str:
    """A value as YAML has it."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:20]}..."


def _columns(rows: list[tuple[str, str]]) -> str:
    """Two columns, the right one wrapped; a left one that is too long has a line of its own."""
    left = min(max(len(name) for name, _ in rows), 34) + 2
    lines = []
    for name, what in rows:
        wrapped = textwrap.wrap(what, _WIDTH - left - 2) or [""]
        if len(name) > left - 2:
            lines.append(f"  {name}")
            name = ""
        lines += [f"  {name if number == 0 else '':<{left}}{line}".rstrip() for number, line in enumerate(wrapped)]
    return "\n".join(lines)
