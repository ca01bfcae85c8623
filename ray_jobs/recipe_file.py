"""Reading recipe files: every key with the file and line where it stands, so that a refusal can say where to look."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from pipelines.errors import UserError
from pipelines.files import read_text
from pipelines.manifest import fingerprint
from ray_jobs.recipe import RECIPES, Recipe

ARM = "*"
"""Stands for an arm's name in the keys of `known_keys`."""


@dataclass(frozen=True)
class Given:
    """A value that somebody gave to a key, and where: `recipe.yaml:12` or `--train.seed`."""

    value: Any
    where: str


@cache
def known_keys() -> dict[str, Any]:
    """Dotted key -> type, of every key that a recipe may hold, in the order of the dataclasses."""
    return dict(_keys_of(Recipe, ""))


def _keys_of(section: type, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(section)
    for key in fields(section):
        name, kind = f"{prefix}{key.name}", hints[key.name]
        inner = get_args(kind)[-1] if getattr(kind, "__origin__", None) is dict else kind
        if is_dataclass(inner):
            assert isinstance(inner, type)
            yield from _keys_of(inner, f"{name}." if inner is kind else f"{name}.{ARM}.")
        else:
            yield name, kind


def as_known(key: str) -> str:
    """`arms.enhanced.text` as it stands in `known_keys`, where an arm may have any name."""
    parts = key.split(".")
    return ".".join([parts[0], ARM, *parts[2:]]) if parts[0] == "arms" and len(parts) > 2 else key


def is_section(key: str) -> bool:
    """Keys stand below it; an arm is one, whatever its name."""
    parts = key.split(".")
    if parts[0] == "arms" and len(parts) == 2:
        return True
    return any(known.startswith(f"{as_known(key)}.") for known in known_keys())


def nearest(key: str) -> str:
    """The known key that was probably meant: alike in the same section, or of the same name in another; else empty."""
    wanted, known = as_known(key), list(known_keys())
    section, _, leaf = wanted.rpartition(".")
    depth = wanted.count(".") + 1
    siblings = {".".join(name.split(".")[:depth]) for name in known if not section or name.startswith(f"{section}.")}
    namesakes = [name for name in known if name.rpartition(".")[2] == leaf]
    alike = difflib.get_close_matches(wanted, siblings, n=1) or namesakes or difflib.get_close_matches(wanted, known)
    arm = key.split(".")[1] if key.startswith("arms.") and "." in key else "NAME"
    return alike[0].replace(ARM, arm) if alike else ""


def recipe_path(name: str) -> Path:
    """A recipe's file: a path as it is, or the name of a recipe that comes with captune."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if path.name == name and shipped.is_file():
        return shipped
    ours = (path for path in RECIPES.glob("*.yaml") if "\nprocess:" not in path.read_text())  # not Data-Juicer's
    known = ", ".join(sorted(path.stem for path in ours))
    raise UserError(f"{name}: no such recipe file (recipes that come with captune: {known})")


def files_of(name: str) -> dict[str, str]:
    """A recipe's file, and the Data-Juicer recipes that it names by their full path and that lie beside it: what a
    cluster's job is given. Name -> text.
    """
    path = recipe_path(name)
    files = {path.name: read_text(path)}
    said = yaml.safe_load(files[path.name]) or {}
    for config in (said.get("refine"), *(said.get("arms") or {}).values()):
        own = Path((config or {}).get("recipe") or "")
        if own.is_absolute() and (path.parent / own.name).is_file():
            files[own.name] = read_text(path.parent / own.name)
    return files


def digest(files: dict[str, str]) -> str:
    """What tells one recipe's files from another's: 16 hexadecimal digits."""
    return fingerprint(files)[:16]


def require_same(name: str, wanted: str) -> None:
    """Nothing when a recipe is the one that a command was made for.

    Raises:
        UserError: it is another.
    """
    found = digest(files_of(name))
    if found != wanted:
        raise UserError(
            f"{recipe_path(name)}: holds another recipe ({found}) than this job was made for ({wanted}), and nothing "
            "was begun. Render it again and apply that; a recipe of its own run_dir does not touch this one's"
        )


def read_recipe(name: str) -> dict[str, Given]:
    """Dotted key -> what the recipe gives it, the recipes that it is based on included; the keys of the later win.

    Every key is known, whichever command will use it; that its value has the right type is not yet checked.

    Raises:
        UserError: no such file, no YAML, or a key that no recipe has (file, line and the nearest key are named).
    """
    chain: list[Path] = []
    found: dict[str, Given] = {}
    path: Path | None = recipe_path(name)
    while path is not None:
        if path in chain:
            raise UserError(f"{chain[0]}: its `base` leads back to itself")
        chain.append(path)
        own = dict(_read_file(path))
        base = own.pop("base", None)
        if any(key.startswith("arms.") for key in found):  # arms are chosen together
            own = {key: given for key, given in own.items() if not key.startswith("arms.")}
        found = own | found
        path = _base_path(path, base) if base else None
    return found


def _base_path(path: Path, base: Given) -> Path:
    """A recipe's base lies beside it, or is named as any recipe is."""
    beside = path.parent / str(base.value)
    return beside if beside.is_file() else recipe_path(str(base.value))


def _read_file(path: Path) -> Iterator[tuple[str, Given]]:
    """Keys of one file, `base` among them."""
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error})") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({error.problem or error.context})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML ({error})") from error
    if isinstance(root, yaml.MappingNode) and "process" in (name.value for name, _ in root.value):
        raise UserError(f"{path}: a Data-Juicer recipe; a captune recipe names it as refine.recipe or arms.NAME.recipe")
    if root is not None:
        yield from _read_section(root, "", path, loader)


def _read_section(node: yaml.Node, section: str, path: Path, loader: yaml.SafeLoader) -> Iterator[tuple[str, Given]]:
    """Keys of a mapping, with those of the sections within."""
    here = f"{path}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        if isinstance(node, yaml.ScalarNode) and loader.construct_object(node) is None:
            return  # nothing but comments below the section's name
        what = f"{section} is a section: its keys stand" if section else "not a recipe: keys and their values stand"
        raise UserError(f"{here}: {what} below it, one a line")
    _refuse_doubles(node, section, path)
    loader.flatten_mapping(node)  # `<<: *anchor`
    for name_node, value in node.value:
        key = f"{section}.{name_node.value}" if section else str(name_node.value)
        where = f"{path}:{name_node.start_mark.line + 1}"
        if is_section(key):
            if key.startswith("arms."):
                yield key, Given({}, where)  # an arm may have nothing but defaults
            yield from _read_section(value, key, path, loader)
        elif as_known(key) in known_keys() or key == "base":
            yield key, Given(loader.construct_object(value, deep=True), where)
        else:
            raise UserError(f"{where}: {_unknown(key)}")


def _refuse_doubles(node: yaml.MappingNode, section: str, path: Path) -> None:
    """YAML lets the last of two equal keys win, silently."""
    lines: dict[str, int] = {}
    for name_node, _ in node.value:
        name, line = str(name_node.value), name_node.start_mark.line + 1
        if name in lines:
            raise UserError(f"{path}:{line}: {section}{'.' * bool(section)}{name} stands in line {lines[name]} already")
        lines[name] = line


def _unknown(key: str) -> str:
    near = nearest(key)
    return f"no recipe has a key {key}" + (f"; the nearest is {near}" if near else "")
