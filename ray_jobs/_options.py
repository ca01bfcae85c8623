"""Options of a command: the keys of a recipe, plus the paths that the command itself needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import jsonargparse

from pipelines.errors import UserError
from ray_jobs.recipe import Recipe, recipe_chain, recipe_path

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def parse(
    command: str, about: str, argv: list[str], add: Callable[[ArgumentParser], object] | None = None
) -> tuple[Recipe, Namespace]:
    """Read `argv` into the recipe and the command's own options.

    A recipe file (`--config`, or the first bare word of `captune run`) may hold every section, whichever command reads
    it; options on the command line win over it.

    Raises:
        UserError: an impossible value (the sections' own checks). Unknown keys and wrong types end the process with
            status 2.
    """
    parser = jsonargparse.ArgumentParser(prog=f"captune {command}", description=about, default_env=False)
    parser.add_argument(
        "--config", action="config", help="recipe file (YAML), or the name of a recipe that comes with captune"
    )
    parser.add_argument("--base", type=str, help="in a recipe file: the recipe whose keys this one changes")
    if add is not None:
        add(parser)
    parser.add_class_arguments(Recipe)
    try:
        settings = parser.parse_args(_with_recipe_path(argv))
        values = parser.instantiate_classes(settings)
    except ValueError as error:
        raise UserError(_plain(error)) from error
    return Recipe(**{field.name: values[field.name] for field in fields(Recipe)}), values


def _with_recipe_path(argv: list[str]) -> list[str]:
    """Replace the name of a shipped recipe after `--config` by its path, preceded by the recipe that it is based on."""
    resolved: list[str] = []
    words = iter(argv)
    for word in words:
        option, _, name = word.partition("=")
        if option != "--config":
            resolved.append(word)
            continue
        for path in recipe_chain(recipe_path(name or next(words, ""))):
            resolved += ["--config", str(path)]
    return resolved


def _plain(error: ValueError) -> str:
    """The innermost message: parsers wrap the sections' own errors."""
    inner: BaseException = error
    while inner.__cause__ is not None:
        inner = inner.__cause__
    return str(inner)


def required(value: str | None, option: str, command: str) -> str:
    """A path that the command cannot do without."""
    if not value:
        raise UserError(f"captune {command} needs {option}")
    return lasting(value, option) if option.startswith(("--output", "--out ")) else value


def lasting(path: str, key: str) -> str:
    """A path to write to, refused when it would vanish with the directory that Ray unpacks on one node for one job.

    Raises:
        UserError: it lies in the working directory of `ray job submit --working-dir`.
    """
    place = Path(path).resolve()
    if "working_dir_files" in place.parts and "runtime_resources" in place.parts:
        raise UserError(
            f"{key.split()[0]}: '{path}' lies in the job's temporary working directory, which other nodes do "
            f"not see and Ray "
            "deletes; give an absolute path on storage that every node mounts"
        )
    return path


def input_output(parser: ArgumentParser) -> None:
    """The options of every stage that reads a dataset or a directory and writes a directory."""
    parser.add_argument("--input", type=str, help="dataset or directory to read")
    parser.add_argument("--output", type=str, help="directory to write")
    parser.add_argument("--restart", type=bool, default=False, help="throw away another run's output and start over")
