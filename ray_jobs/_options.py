"""Options of a command: what it declares, and how its words and recipe files become a recipe and its own options.

A command declares itself as a `Command`: which sections of a recipe it reads, and options of its own. Words and files
are read here, so that a refusal names the word or the line; jsonargparse gives the values their types.
"""

from __future__ import annotations

import argparse
import difflib
import keyword
import os
import re
import types
from collections import deque
from dataclasses import dataclass, fields, is_dataclass, replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import jsonargparse

from pipelines.errors import UserError
from pipelines.formats.reading import Reading, columns_of
from ray_jobs.recipe import ArmConfig, Recipe, expanded
from ray_jobs.recipe_file import Given, as_known, is_section, known_keys, nearest, read_recipe

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Section = TypeVar("Section", bound="DataclassInstance")
WHOLE = tuple(key.name for key in fields(Recipe))
"""Every section: what a command reads that walks the whole hallway."""
CONFIG = "config"
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
    Literal["auto"]: "auto",
    list[int]: "a list of whole numbers",
    list[str]: "a list of words",
    dict[str, float]: "a mapping of words to numbers",
    dict[str, Any]: "a mapping of keys to values",
}


@dataclass(frozen=True)
class Option:
    """An option of a command's own.

    Attributes:
        name: `--output`.
        value: what it takes, as the help shows it, e.g. DIR; empty: it is a flag.
        about: one line for the help.
        key: the recipe's key that it is another name of, e.g. `evaluate.images`; `config` for a recipe file.
        choices: all values that it can have.
        default: what it is when nobody says so.
        number: its value is a whole number.
        path: its value is a path: `~` in it is the home directory.
        writes: the command writes there: refused where Ray would delete it.
        needed: the command can do nothing without it.
        many: it may be given several times; its value is a list.
    """

    name: str
    value: str = ""
    about: str = ""
    key: str = ""
    choices: tuple[str, ...] = ()
    default: Any = None
    number: bool = False
    path: bool = False
    writes: bool = False
    needed: bool = False
    many: bool = False

    @property
    def attribute(self) -> str:
        """Its name among the parsed options: `options.remote_code`, `options.from_`."""
        name = self.name.lstrip("-").replace("-", "_")
        return f"{name}_" if keyword.iskeyword(name) else name


@dataclass(frozen=True)
class Command:
    """What a command takes.

    Attributes:
        name: as people type it, e.g. `convert-lora`.
        about: what it does, in a sentence or two.
        options: of its own; `--config RECIPE` and `--json` belong to every command.
        reads: sections (or single keys) of a recipe that it uses; those of others may stand in its recipe file, but not
            on its command line.
        first: name of the option that a bare word gives: `captune check DIR`.
        example: a command line that makes sense.
    """

    name: str
    about: str
    options: tuple[Option, ...] = ()
    reads: tuple[str, ...] = ()
    first: str = ""
    example: str = ""

    def uses(self, key: str) -> bool:
        """A key of a recipe is one of this command's. `run_dir` is everybody's, because paths may refer to it."""
        return any(key == read or key.startswith(f"{read}.") for read in (*self.reads, *["run_dir"] * bool(self.reads)))

    def every_option(self) -> tuple[Option, ...]:
        """Its own and those of every command."""
        names = {option.name for option in self.options}
        return (*self.options, *(option for option in (CONFIG_OPTION, JSON) if option.name not in names))


CONFIG_OPTION = Option("--config", "RECIPE", "recipe file, or the name of one that comes with captune", key=CONFIG)
JSON = Option("--json", about="the result as JSON on standard output")
COLUMNS = Option(
    "--columns", "NAME=COLUMN", "the dataset's own name of caption or image, as in caption=TEXT", many=True
)
RESTART = Option("--restart", about="throw away what another run left in the output, and start over")


def reading(about: str, name: str = "--input", value: str = "DIR", key: str = "", needed: bool = True) -> Option:
    """An option that names what a command reads."""
    return Option(name, value, about, key=key, path=True, needed=needed)


def writing(about: str = "directory to write", value: str = "DIR", needed: bool = True) -> Option:
    """The option that names what a command writes."""
    return Option("--output", value, about, path=True, writes=True, needed=needed)


def parse(command: Command, argv: list[str]) -> tuple[Recipe, SimpleNamespace]:
    """Read `argv` into the recipe and the command's own options; `recipes` among those are the recipe files' names.

    A recipe file may hold every section, whichever command reads it; words on the command line win over it. Sections
    that the command does not read stay as they are by default. `-h`, `--help`, `--help-all` and `--SECTION.help` print
    and end the process with status 0.

    Raises:
        UserError: an unknown or unused key, a wrong type or an impossible value; file and line, or the option, are
            named.
    """
    from ray_jobs import _help

    if page := _help.asked_for(command, argv):
        print(page)
        raise SystemExit(0)
    own, values, recipes = _read_words(command, argv)
    in_files = [(key, given) for name in recipes for key, given in read_recipe(name).items()]
    values = {key: given for key, given in in_files if command.uses(key)} | values
    recipe = _recipe(values)
    options = SimpleNamespace(recipes=recipes)
    for option in command.every_option():
        if option.key != CONFIG:
            setattr(options, option.attribute, _own_value(command, option, own.get(option.name, []), recipe))
    return recipe, options


def reading_of(recipe: Recipe, options: SimpleNamespace) -> Reading:
    """How the dataset is read: as the recipe says, with `--columns` in place of its columns."""
    reading = recipe.caption.reading
    return replace(reading, columns={**reading.columns, **columns_of(options.columns)})


def required(value: Any, option: str, command: str) -> str:
    """A value that the command cannot do without after all."""
    if not value:
        raise UserError(f"captune {command} needs {option}")
    return str(value)


def lasting(path: str, key: str) -> str:
    """A path to write to, refused when it would vanish with the directory that Ray unpacks on one node for one job.

    Raises:
        UserError: it lies in the working directory of `ray job submit --working-dir`.
    """
    place = Path(path).resolve()
    if "working_dir_files" in place.parts and "runtime_resources" in place.parts:
        raise UserError(
            f"{key}: '{path}' lies in the job's temporary working directory, which other nodes do not see and Ray "
            "deletes; give an absolute path on storage that every node mounts"
        )
    return path


def _read_words(command: Command, argv: list[str]) -> tuple[dict[str, list[str]], dict[str, Given], list[str]]:
    """Own options -> texts, keys of the recipe -> what was given, and the recipe files, in order."""
    known = {option.name: option for option in command.every_option()}
    own: dict[str, list[str]] = {}
    keys: dict[str, Given] = {}
    recipes: list[str] = []
    words = deque(argv)
    while words:
        word = words.popleft()
        name, equals, text = word.partition("=")
        if not word.startswith("--"):
            name, text = _taker(command, word, own), word
        elif name not in known and not _takes(command, name.removeprefix("--")):
            raise UserError(_unused(command, name))
        elif name in known and not known[name].value:  # a flag; older recipes of commands say `--restart true`
            text = text or (words.popleft() if words and words[0] in ("true", "false") else "true")
        elif not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"captune {command.name}: {name} needs a value")
            text = words.popleft()
        key = known[name].key if name in known else name.removeprefix("--")
        if key == CONFIG:
            recipes.append(text)
        elif key:
            keys[key] = Given(text, name)
        else:
            own.setdefault(name, []).append(text)
    return own, keys, recipes


def _takes(command: Command, key: str) -> bool:
    return command.uses(key) and as_known(key) in known_keys()


def _taker(command: Command, word: str, own: dict[str, list[str]]) -> str:
    """The option that a bare word gives its value to."""
    for option in command.every_option():
        if option.name == command.first and (option.many or option.name not in own):
            own.setdefault(option.name, [])
            return option.name
    raise UserError(f"captune {command.name}: what is '{word}' for?\n{_see_help(command)}")


def _unused(command: Command, name: str) -> str:
    """Why a word that looks like an option is none of this command's."""
    key, section = name.removeprefix("--"), name.removeprefix("--").split(".")[0]
    if is_section(key) and command.uses(key):
        why = f"{name} is a section of a recipe; give its keys, as in {name}.KEY"
    elif as_known(key) in known_keys() or (is_section(key) and not command.uses(key)):
        what = f"the section {section}" if is_section(section) else f"the key {section}"
        why = f"captune {command.name} does not use {what} of a recipe, and so not {name}"
    else:
        own = [option.name for option in command.every_option()]
        near = difflib.get_close_matches(name, own, n=1) or [f"--{found}" for found in [nearest(key)] if found]
        why = f"captune {command.name} has no option {name}{_meant(near)}"
    return f"{why}\n{_see_help(command)}"


def _see_help(command: Command) -> str:
    return f"captune {command.name} --help lists what it takes"


def _recipe(values: dict[str, Given]) -> Recipe:
    """The default recipe with these values in place of its own."""
    typed = _typed(values)
    try:
        arms = {arm: _arm(arm, typed) for arm in dict.fromkeys(key.split(".")[1] for key in values if _of_arm(key))}
        recipe = _changed(Recipe(), "", {key: value for key, value in typed.items() if not _of_arm(key)})
        return replace(recipe, arms=arms)
    except UserError as error:
        key = str(error).partition(" ")[0].rstrip(":")
        while key and key not in values:  # a key within one whose value is a mapping
            key = key.rpartition(".")[0]
        where = values[key].where if key else ""
        raise UserError(str(error) if where.startswith("--") or not where else f"{where}: {error}") from error


def _typed(values: dict[str, Given]) -> dict[str, Any]:
    """Dotted key -> value of the key's type. Texts of the command line become what YAML would make of them."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False, default_env=False)
    names = {f"v{number}": key for number, key in enumerate(values) if not is_section(key)}
    for name, key in names.items():
        kind = known_keys()[as_known(key)]
        parser.add_argument(f"--{name}", type=kind)
        if values[key].value is None and types.NoneType not in get_args(kind):
            raise UserError(_mistyped(key, values[key]))
    try:
        found = parser.parse_object({name: values[key].value for name, key in names.items()})
    except argparse.ArgumentError as error:
        key = names[re.findall(r'"(v\d+)"', str(error))[0]]
        raise UserError(_mistyped(key, values[key])) from error
    return {key: found[name] for name, key in names.items()}


def _mistyped(key: str, given: Given) -> str:
    kind = known_keys()[as_known(key)]
    wanted = _WORDS[kind] if kind in _WORDS else " or ".join(_WORDS[part] for part in get_args(kind))
    where = given.where if given.where == f"--{key}" else f"{given.where}: {key}"
    value = "null" if given.value is None else given.value
    return f"{where}: '{value}' is not {wanted}"


def _of_arm(key: str) -> bool:
    return key.startswith("arms.")


def _arm(arm: str, typed: dict[str, Any]) -> ArmConfig:
    """One arm; most of its keys are those of the section `refine`, and errors name them as they stand."""
    try:
        return _changed(ArmConfig(), f"arms.{arm}.", typed)
    except UserError as error:
        raise UserError(str(error).replace("refine.", f"arms.{arm}.", 1)) from error


def _changed(section: Section, prefix: str, typed: dict[str, Any]) -> Section:
    """A section with its own keys' values in place of its defaults, and so those within."""
    changes: dict[str, Any] = {}
    for key in fields(section):
        name, value = f"{prefix}{key.name}", getattr(section, key.name)
        if is_dataclass(value) and any(inner.startswith(f"{name}.") for inner in typed):
            assert not isinstance(value, type)
            changes[key.name] = _changed(value, f"{name}.", typed)
        elif name in typed:
            changes[key.name] = typed[name]
    return replace(section, **changes)


def _own_value(command: Command, option: Option, texts: list[str], recipe: Recipe) -> Any:
    """The value of one of the command's own options."""
    if option.key:
        value = attrgetter(option.key)(recipe)
    elif not option.value:
        value = texts[-1:] == ["true"]
    else:
        given = [_checked(option, text, recipe.run_dir) for text in texts]
        value = given if option.many else given[-1] if given else option.default
    if option.needed and not value:
        raise UserError(f"captune {command.name} needs {option.name} {option.value}\n{_see_help(command)}")
    return lasting(value, option.name) if option.writes and value else value


def _checked(option: Option, text: str, run_dir: str) -> Any:
    """A text as a value of the option's kind."""
    if option.choices and text not in option.choices:
        near = difflib.get_close_matches(text, option.choices, n=1)
        raise UserError(f"{option.name}: '{text}' is none of {', '.join(option.choices)}" + _meant(near))
    if option.number:
        if not text.lstrip("-").isdecimal():
            raise UserError(f"{option.name}: '{text}' is not a whole number")
        return int(text)
    return os.path.expanduser(expanded(option.name, text, run_dir)) if option.path else text


def _meant(near: list[str]) -> str:
    return f"; did you mean {near[0]}?" if near else ""
