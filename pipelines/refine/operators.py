"""Data-Juicer recipes: read one, check it before any row is touched, and build the operators of the installed
data_juicer.

Only this file knows how Data-Juicer must be imported. Importing it has side effects that a library has no business
with, and they are undone here: it tells Pillow to accept truncated images (captune counts those as broken), it installs
missing packages with pip in the middle of a run, and it logs every import.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pipelines.errors import UserError
from pipelines.progress import say

Process = list[dict[str, dict[str, Any]]]
"""The `process` list of a recipe: one `{operator name: its parameters}` per operator."""

GLOBAL_OPERATORS = (
    "document_deduplicator",
    "document_minhash_deduplicator",
    "document_simhash_deduplicator",
    "frequency_specified_field_selector",
    "random_selector",
    "range_specified_field_selector",
    "tags_specified_field_selector",
    "topk_specified_field_selector",
)
"""Operators that must see all rows at once; captune runs each as a pass of its own (`together.py`)."""

_OTHER_MEDIA = ("video_", "audio_")
_OF_FIELDS = ("general_field_filter", "specified_field_filter", "specified_numeric_field_filter")
"""Filters that look at whatever else came with a row."""
_EXPONENT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
_FIXED_KEYS = {"text_key": "text", "image_key": "images", "image_bytes_key": "image_bytes"}


class MissingPackage(ImportError):
    """Data-Juicer wanted to install this package at run time."""


@dataclass
class Operator:
    """One step of a recipe.

    Attributes:
        label: the operator's name; a second use of the same operator gets `#2`. This is what the funnel and the rejects
            say.
        op: the Data-Juicer operator object.
        kind: `filter`, `mapper` or `global`.
        reads_images: it looks at `images` / `image_bytes`.
        wants_token: it pairs image tokens in the text with the images, so the text must hold `<__dj__image>`; a filter
            on text alone would count that token as characters, so it gets the bare text.
        shares_images: Data-Juicer lets it keep decoded images in a context that the next image operator reuses.
        takes_words: Data-Juicer lets it find a text's words in that context instead of splitting at white space.
        reads_fields: it looks at the other fields of a row, which are its `meta`.
    """

    label: str
    op: Any
    kind: str
    reads_images: bool
    wants_token: bool
    shares_images: bool
    takes_words: bool
    reads_fields: bool

    @property
    def name(self) -> str:
        """As Data-Juicer calls it."""
        return self.label.split("#")[0]


def read_recipe(path: str | Path) -> Process:
    """The `process` list of a Data-Juicer recipe (YAML).

    The other keys of a recipe (dataset_path, export_path, np, ...) belong to Data-Juicer's own executor; captune has
    its own ways to say those things and names what it ignores.

    Raises:
        UserError: no such file, no YAML, or no list of operators in it.
    """
    import yaml

    path = Path(path)
    if not path.is_file():
        raise UserError(f"refine.recipe: {path}: no such file")
    try:
        recipe = yaml.load(path.read_text(), _loader())  # noqa: S506  (a safe loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"refine.recipe: {path}: not valid YAML ({error})") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("process"), list) or not recipe["process"]:
        raise UserError(
            f"refine.recipe: {path}: a Data-Juicer recipe has a `process:` list of operators, and this file has none"
        )
    ignored = sorted(set(recipe) - {"process", "project_name"})
    if ignored:
        say(f"refine: {path}: ignoring {', '.join(ignored)} (only `process` counts here)")
    return [_entry(path, number, entry) for number, entry in enumerate(recipe["process"], start=1)]


def _loader() -> Any:
    """A safe loader that reads `2e5` as the number that YAML 1.2 and Data-Juicer take it for."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.1 with the exponents of 1.2."""

    def number(loader: Any, node: Any) -> float:
        value = float(loader.construct_scalar(node))
        return int(value) if value.is_integer() else value

    Loader.add_implicit_resolver("!exponent", _EXPONENT, list("-+.0123456789"))
    Loader.add_constructor("!exponent", number)
    return Loader


def _entry(path: Path, number: int, entry: Any) -> dict[str, dict[str, Any]]:
    if isinstance(entry, str):
        entry = {entry: None}
    if isinstance(entry, dict) and len(entry) == 1:
        (name, parameters), *_ = entry.items()
        if isinstance(name, str) and (parameters is None or isinstance(parameters, dict)):
            return {name: parameters or {}}
    raise UserError(
        f"refine.recipe: {path}: process entry {number} is not `operator: {{parameter: value}}` but {entry!r}"
    )


def build(process: Process, *, check: bool = True) -> list[Operator]:
    """Operators of a recipe, in its order, built from the installed data_juicer.

    Args:
        check: look at names, types and values first. Workers, whose recipe the driver has checked, save the seconds
            that it takes.

    Raises:
        UserError: an unknown operator (near names are suggested), an unknown or impossible parameter, an operator of a
            kind that captune cannot run, or one whose extra package is not installed (the package and its extra are
            named).
    """
    if not process:
        return []
    modules = load_data_juicer()
    if check:
        _check_names_and_types(process)
    operators: list[Operator] = []
    for entry in process:
        ((name, parameters),) = entry.items()
        uses = sum(operator.name == name for operator in operators) + 1
        label = name if uses == 1 else f"{name}#{uses}"
        kind = _kind(name, modules[name])
        if check:
            _check_values(name, modules[name], parameters)
        try:
            op = modules[name](**parameters)
        except ImportError as error:
            raise missing_package(name, error) from error
        except Exception as error:  # an operator's constructor raises whatever it likes about a value that it dislikes
            raise UserError(f"refine.recipe: {name} cannot be built: {type(error).__name__}: {error}") from error
        operators.append(_describe(label, name, op, kind))
    return operators


def load_data_juicer() -> dict[str, Any]:
    """Import Data-Juicer without its side effects and return its operator classes by name."""
    from loguru import logger
    from PIL import ImageFile

    if "data_juicer" not in sys.modules:
        truncated = ImageFile.LOAD_TRUNCATED_IMAGES
        import data_juicer  # noqa: F401

        ImageFile.LOAD_TRUNCATED_IMAGES = truncated
        logger.remove()
        logger.add(sys.stderr, level="WARNING")
    from data_juicer.ops import OPERATORS
    from data_juicer.utils.lazy_loader import LazyLoader

    LazyLoader._install_package = classmethod(_refuse_to_install)
    modules: dict[str, Any] = OPERATORS.modules
    return modules


def _refuse_to_install(_loader: type, package: Any, _pip_args: Any = None) -> None:
    raise MissingPackage(package if isinstance(package, str) else "a package that Data-Juicer does not name")


def missing_package(name: str, error: ImportError) -> UserError:
    """What to tell the user when operator `name` ran into `error`."""
    package = str(error) if isinstance(error, MissingPackage) else (error.name or str(error))
    extras = ", ".join(f"py-data-juicer[{extra}]" for extra in _extras_with(package))
    return UserError(
        f"refine.recipe: {name} needs the package {package}, which is not installed: "
        f"pip install '{package}'" + (f" (it belongs to {extras})" if extras else "")
    )


def _extras_with(package: str) -> list[str]:
    """Extras of py-data-juicer that bring `package`; `all` and `dev` say nothing to a user."""
    from importlib import metadata

    from packaging.requirements import InvalidRequirement, Requirement

    try:
        wanted = Requirement(package).name.lower()
    except InvalidRequirement:
        return []
    distribution = metadata.distribution("py-data-juicer")
    extras = distribution.metadata.get_all("Provides-Extra") or []
    found: set[str] = set()
    for text in distribution.requires or []:
        requirement = Requirement(text)
        if requirement.name.lower() != wanted or requirement.marker is None:
            continue
        found |= {extra for extra in extras if f'extra == "{extra}"' in str(requirement.marker)}
    return sorted(found - {"all", "dev"})


def _check_names_and_types(process: Process) -> None:
    from data_juicer.core.preflight import PipelineConfigError, pre_instantiation_check

    try:
        pre_instantiation_check(process)
    except PipelineConfigError as error:
        lines = []
        for found in error.errors:
            near = f" (did you mean {', '.join(found.suggestions)}?)" if found.suggestions else ""
            lines.append(f"{found.op_name}: {found.message}{near}")
        raise UserError("refine.recipe: " + "; ".join(lines)) from error


def _check_values(name: str, operator: Any, parameters: dict[str, Any]) -> None:
    """What Data-Juicer's own check lets through: constrained numbers, and keys of a sample format that is fixed
    here.
    """
    from data_juicer.core.preflight import _get_valid_params
    from pydantic import TypeAdapter, ValidationError

    if name == "suffix_filter" and parameters.get("suffixes"):
        raise UserError(f"refine.recipe: {name} looks at the name of a row's file, and captune's rows have none")
    annotations = _get_valid_params(operator)
    for key, value in parameters.items():
        if key in _FIXED_KEYS and value != _FIXED_KEYS[key]:
            raise UserError(
                f"refine.recipe: {name}.{key}: captune hands samples over as '{_FIXED_KEYS[key]}', not as '{value}'"
            )
        annotation = annotations[key]
        if get_origin(annotation) is not Annotated or value is None:
            continue
        try:
            TypeAdapter(annotation).validate_python(value, strict=True)
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise UserError(
                f"refine.recipe: {name}.{key}: {problem}, not {value!r} (a {get_args(annotation)[0].__name__})"
            ) from error


def _kind(name: str, operator: Any) -> str:
    from data_juicer.ops import Filter, Mapper

    if name in GLOBAL_OPERATORS:
        return "global"
    if name == "general_fused_op":
        raise UserError(f"refine.recipe: {name} cannot run here; list its operators one by one")
    if name.startswith(_OTHER_MEDIA):
        raise UserError(f"refine.recipe: {name} works on video or audio, and captune's samples are images with text")
    if name.endswith("_deduplicator"):
        supported = ", ".join(GLOBAL_OPERATORS)
        raise UserError(
            f"refine.recipe: {name} is not supported; the deduplicators that captune can run are: {supported}"
        )
    if issubclass(operator, Filter):
        return "filter"
    if issubclass(operator, Mapper) and "Fields.meta" in _source(operator):
        raise UserError(f"refine.recipe: {name} writes beside a row's text, into `__dj__meta__`, which captune drops")
    if issubclass(operator, Mapper) and not name.startswith("image_"):
        return "mapper"
    kind = "an image mapper" if issubclass(operator, Mapper) else f"a {operator.__mro__[1].__name__.lower()}"
    raise UserError(
        f"refine.recipe: {name} is {kind}; captune runs filters, text mappers and {', '.join(GLOBAL_OPERATORS)}"
    )


def _source(operator: type) -> str:
    import inspect

    return inspect.getsource(sys.modules[operator.__module__])


def _describe(label: str, name: str, op: Any, kind: str) -> Operator:
    """What an operator looks at is said nowhere in Data-Juicer's interface, so its source is asked."""
    from data_juicer.ops.op_fusion import INTER_WORDS, LOADED_IMAGES

    source = _source(type(op))
    return Operator(
        label=label,
        op=op,
        kind=kind,
        reads_images="image_key" in source,
        wants_token="SpecialTokens." in source,
        shares_images=kind == "filter" and name in LOADED_IMAGES.modules,
        takes_words=kind == "filter" and name in INTER_WORDS.modules,
        reads_fields=name in _OF_FIELDS,
    )
