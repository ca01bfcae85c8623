"""Which files of a folder are its dataset: people's folders hold an index beside the shards, statistics, a test split.

What could be meant in two ways is refused with what there is; what is left out is said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.errors import UserError
from pipelines.formats import arrow, delimited, imagefolder
from pipelines.formats.coco import is_coco
from pipelines.formats.packed import ending, unpacked
from pipelines.formats.reading import DEFAULT
from pipelines.formats.rows import parse_json
from pipelines.progress import say
from pipelines.storage import AnyPath, names_in

_SHARDS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
_LINES = (".jsonl", ".ndjson")
_TRAIN, _OTHERS = {"train", "training"}, {"test", "validation", "valid", "val", "dev", "eval"}
_ABOUT = {"dataset_info.json", "dataset_dict.json", arrow.STATE}
"""What Hugging Face's `datasets` writes about a dataset."""
_ROW = re.compile(rb'"(conversations|image|images)"\s*:')


@dataclass(frozen=True)
class Chosen:
    """What a folder means: a file or a folder within it that has a format of its own (`file`, `folder`), or itself.

    Attributes:
        format: one of `pipelines.formats`, or one of the two.
        path: of the file or folder; the folder itself otherwise.
        parts: those of its files that are meant; empty: all of the format.
    """

    format: str
    path: AnyPath
    parts: tuple[AnyPath, ...] = ()


@dataclass
class _Names:
    """Names in a folder that may be a dataset's: files by ending, pictures without theirs, folders."""

    files: dict[str, list[str]] = field(default_factory=dict)
    pictures: set[str] = field(default_factory=set)
    folders: list[str] = field(default_factory=list)


def choose(path: AnyPath) -> Chosen | None:
    """The dataset of a folder; None when there is none.

    Raises:
        UserError: there are several.
    """
    names = _names(path)
    if chosen := _shards(path, names) or _one_file(path, names):
        return chosen
    if any(name in names.files.get(ending(name), ()) for name in imagefolder.METADATA):
        return Chosen("imagefolder", path)
    if chosen := _within(path, names):
        return chosen
    return Chosen("imagefolder", path) if names.pictures or imagefolder.has_pictures(path) else None


def _names(path: AnyPath) -> _Names:
    found = _Names()
    for name, is_folder in names_in(path):
        if name.startswith("."):
            continue
        if is_folder:
            found.folders.append(name)
        elif imagefolder.is_picture(name):
            found.pictures.add(os.path.splitext(name)[0])
        elif ending(name) in (*_SHARDS, *_LINES, ".json", *delimited.ENDINGS):
            found.files.setdefault(ending(name), []).append(name)
    for names in (*found.files.values(), found.folders):
        names.sort()
    return found


def _shards(path: AnyPath, names: _Names) -> Chosen | None:
    """Tars, Parquet or Arrow; a table beside each tar or folder (`00000.parquet`, `00000.tar`) is its index."""
    aside = imagefolder.METADATA if names.pictures or names.folders else ()
    tables = [name for name in names.files.get(".parquet", ()) if name not in aside]
    tars, stems = names.files.get(".tar", []), {name.rpartition(".")[0] for name in tables}
    if tars and stems - {name.partition(".")[0] for name in tars}:
        raise UserError(
            f"{path}: holds tars and Parquet that is not their index ({tars[0]}, {tables[0]}, ...); name one "
            f"kind, as in {path}/*.tar"
        )
    if tables and not tars and stems <= set(names.folders):
        return Chosen("imagefolder", path)
    kind = ".tar" if tars else ".parquet" if tables else ".arrow"
    found = tars or tables or names.files.get(".arrow", [])
    if not found:
        return None
    saved = kind == ".arrow" and arrow.STATE in names.files.get(".json", ())
    chosen = _saved(path) if saved else _one_split(path, found)
    whole = chosen == found and all(name.endswith(kind) for name in found)
    return Chosen(_SHARDS[kind], path, () if whole else tuple(path / name for name in chosen))


def _saved(path: AnyPath) -> list[str]:
    """Files that `save_to_disk` wrote, among which later ones of `datasets`' cache may lie."""
    try:
        state = parse_json((path / arrow.STATE).read_bytes())
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path / arrow.STATE}: does not say which files hold the dataset") from None
    if state.get("_indices_data_files"):  # older versions of `datasets`
        raise UserError(f"{path}: a selection of rows was saved here; save it anew after flatten_indices()")
    return names


def _one_split(path: AnyPath, names: list[str]) -> list[str]:
    """Files of the training split, where names tell that from others."""
    train = [name for name in names if _words(name) & _TRAIN]
    others = [name for name in names if _words(name) & _OTHERS]
    if not train or not others:
        return names
    say(f"{path}: holds several splits; reading train, and not {others[0]} and the like")
    return train


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower()))


def _one_file(path: AnyPath, names: _Names) -> Chosen | None:
    """A file of lines, or of JSON that holds rows; `dataset.jsonl` before all others."""
    lines = [name for each in _LINES for name in names.files.get(each, ()) if name not in imagefolder.METADATA]
    lines = [name for name in lines if name == "dataset.jsonl"] or lines
    found = lines or [name for name in _listed(names) if _holds_rows(path / name)]
    if len(found) > 1 and len(train := _one_split(path, found)) == 1:
        found = train
    if len(found) > 1:
        every = f", or all by {path}/*.jsonl" if lines else ""
        raise UserError(f"{path}: holds several datasets ({', '.join(found[:3])}, ...); name one of them{every}")
    return Chosen("file", path / found[0]) if found else None


def _listed(names: _Names) -> Sequence[str]:
    """Tables in text, and JSON that is neither about one picture nor about the dataset."""
    tables = [name for each in delimited.ENDINGS for name in names.files.get(each, ())]
    return [name for name in tables if name not in imagefolder.METADATA] + [
        name
        for name in names.files.get(".json", ())
        if name not in _ABOUT and not name.endswith("_stats.json") and name.partition(".")[0] not in names.pictures
    ]


def _holds_rows(file: AnyPath) -> bool:
    """LLaVA's list, COCO's captions or a table with pictures and captions, by how a file begins."""
    if ending(file.name) in delimited.ENDINGS:
        columns = delimited.columns_of(file)
        return bool(DEFAULT.image_column(columns) and DEFAULT.caption_column(columns))
    with unpacked(file)[0] as stream:
        head = stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    return is_coco(head) or (head.startswith(b"[") and _ROW.search(head) is not None)


def _within(path: AnyPath, names: _Names) -> Chosen | None:
    """Shards in folders below: the layout of a repository on the Hugging Face hub, or of its `save_to_disk`."""
    found = [name for name in names.folders if _has_shards(path / name)]
    if len(found) > 1:
        found = _one_split(path, found)
    if len(found) > 1:
        raise UserError(
            f"{path}: holds several datasets ({', '.join(found[:3])}, ...); name one of them, or their files by a "
            f"pattern such as {path}/*/*{_has_shards(path / found[0])}"
        )
    if found and names.pictures:
        raise UserError(f"{path}: holds pictures, and a dataset in {found[0]}; name {path / found[0]}, or move it away")
    if not found and not names.pictures and {"train"} < set(names.folders) & (_TRAIN | _OTHERS):
        found = _one_split(path, [name for name in names.folders if name in _TRAIN | _OTHERS])
    elif found:
        say(f"{path}: reading the dataset in {found[0]}")
    return Chosen("folder", path / found[0]) if found else None


def _has_shards(path: AnyPath) -> str:
    """Ending of the shards that lie in a folder; empty when there are none."""
    return next((ending(name) for name, is_folder in names_in(path) if not is_folder and ending(name) in _SHARDS), "")
