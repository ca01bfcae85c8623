"""One file per dataset format; each reads rows and, where it makes sense, writes records back.

`open_dataset(path)` looks at what lies at `path` and picks the reader. A row that cannot be used (a line that is no
JSON, a row without an image, a remote address) is still a row: it carries its `error`, so rows in equal rows out. Only
a path that is no dataset at all is a `UserError`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipelines.errors import UserError
from pipelines.formats.coco import is_coco
from pipelines.formats.folders import choose
from pipelines.formats.llava import is_row
from pipelines.formats.packed import DAMAGED, ending, unpacked
from pipelines.formats.reading import DEFAULT, Reading
from pipelines.formats.rows import Row, error_kind, parse_json, to_record, to_record_and_picture
from pipelines.formats.texts import shown
from pipelines.manifest import require_finished
from pipelines.storage import SCHEMES, AnyPath, RemotePath, expand, files_in, is_glob, is_remote

__all__ = [
    "DEFAULT", "READABLE", "Dataset", "Reading", "Row", "error_kind", "open_dataset", "to_record",
    "to_record_and_picture",
]  # fmt: skip

READABLE = (
    "Data-Juicer JSONL (.jsonl), LLaVA JSON or JSONL (.json, .jsonl), COCO captions (.json), "
    "WebDataset tars (.tar, .tar.gz, .tar.zst), Parquet (.parquet), Arrow files of save_to_disk, CSV (.csv, .tsv), "
    "a folder of any one of these, a pattern such as shards/*.tar, or a folder of pictures"
)
_BY_ENDING = {
    ".jsonl": "datajuicer",
    ".ndjson": "datajuicer",
    ".json": "llava",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".csv": "delimited",
    ".tsv": "delimited",
}
_FILES_ALONE = {"parquet": "*.parquet", "webdataset": "*.tar", "arrow": "*.arrow"}
"""Formats of which a folder is read file by file, and which files these are."""
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True)
class Dataset:
    """A dataset and the format it is in.

    Attributes:
        path: file or folder, or the pattern that names several files.
        format: name of the module in `pipelines.formats` that reads it.
        parts: the files that a pattern names, or those of a folder that are meant; empty for a file or whole folder.
        reading: how it is read where it could be meant in more than one way.
    """

    path: AnyPath | str
    format: str
    parts: tuple[AnyPath, ...] = ()
    reading: Reading = field(default_factory=Reading)

    def rows(self) -> Iterator[Row]:
        """Rows in the order they lie in; never raises for one bad row. One with several captions is several rows.

        Raises:
            UserError: a file turns out not to be in this format at all, or cannot be read any more.
        """
        reader = importlib.import_module(f"pipelines.formats.{self.format}")
        for part in self.parts or (self.path,):
            try:
                for row in reader.rows(part, self.reading):
                    row.where = row.where if row.where.isascii() else shown(row.where)
                    yield row
                    if row.also and row.error is None:
                        yield from _others(row)
            except DAMAGED as error:
                raise UserError(f"{part}: cannot be read ({error})") from error

    def pieces(self) -> list[Dataset]:
        """The files of this dataset as datasets of their own, in the order of its rows; itself, where it is one."""
        files = self.parts
        if not files and self.format in _FILES_ALONE and not isinstance(self.path, str):
            files = tuple(files_in(self.path, _FILES_ALONE[self.format]))
        return [replace(self, path=file, parts=()) for file in files] or [self]

    def identity(self) -> str:
        """What the stage's fingerprint says about its input; see `pipelines.formats.identity`."""
        from pipelines.formats.identity import identity, identity_of_parts, read_otherwise

        try:
            found = identity_of_parts(self.parts) if self.parts else identity(self.path)  # type: ignore[arg-type]
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error})") from error
        return read_otherwise(found, self.reading.decides())


def _others(row: Row) -> Iterator[Row]:
    for number, caption in enumerate(row.also, start=2):
        yield replace(row, where=f"{row.where} caption {number}", caption=caption, also=())


def open_dataset(path: Path | str, reading: Reading = DEFAULT) -> Dataset:
    """Pick the format by what lies at `path`: a file, a folder, or a pattern such as `shards/*.tar`, on a disk or in a
    storage system.

    Raises:
        UserError: nothing there, nothing captune reads, no access, or another stage's unfinished output; a name that is
            no UTF-8.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(f"{shown(str(path))}: this name is no UTF-8, and no record could hold it; rename it") from None
    if is_remote(path):
        try:
            return replace(_open(str(path), RemotePath(str(path))), reading=reading)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be read; credentials and endpoints come from the environment, e.g. "
                f"AWS_ACCESS_KEY_ID, AWS_PROFILE, "
                f"AWS_ENDPOINT_URL ({error})"
            ) from error
    if "://" in str(path):
        raise UserError(
            f"{path}: captune reads datasets from folders and from {', '.join(SCHEMES[:-1])}; download it first"
        )
    return replace(_open(str(path), Path(path).absolute()), reading=reading)


def _open(text: str, path: AnyPath) -> Dataset:
    if path.exists():
        return _open_folder(path) if path.is_dir() else Dataset(path, _format_of_file(path))
    if not is_glob(text):
        raise UserError(f"{text}: no such file or folder; a dataset is {READABLE}")
    parts = tuple(part for part in expand(text) if part.is_file())
    if not parts:
        raise UserError(f"{text}: no file fits this pattern")
    formats = {ending(part.name): _format_of_file(part) for part in reversed(parts)}
    if len(set(formats.values())) > 1:
        raise UserError(f"{text}: fits files of several formats ({', '.join(sorted(set(formats.values())))})")
    return Dataset(text, formats[ending(parts[0].name)], parts)


def _open_folder(path: AnyPath) -> Dataset:
    if isinstance(path, Path):
        require_finished(path)
    chosen = choose(path)
    if chosen is None:
        raise UserError(f"{path}: no dataset in this folder; a dataset is {READABLE}")
    if chosen.format == "folder":
        return _open_folder(chosen.path)
    if chosen.format == "file":
        return Dataset(chosen.path, _format_of_file(chosen.path))
    return Dataset(str(path) if chosen.parts else path, chosen.format, chosen.parts)


def _format_of_file(path: AnyPath) -> str:
    """Its contents say which, and its name where they are odd: then its reader will say what is wrong with it."""
    suffix = ending(path.name)
    try:
        stream, _ = unpacked(path)
        with stream:
            head = stream.read(4096)
    except DAMAGED as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar":
        return "webdataset"
    if suffix in (".json", "") and is_coco(text):
        return "coco"
    if text.startswith(b"{") and suffix in (".json", ".jsonl", ".ndjson", ""):
        return "llava" if _first_line_is_llava(path) else "datajuicer"
    if text.startswith(b"[") and suffix in (".json", ""):
        return "llava"
    if suffix in _BY_ENDING:
        return _BY_ENDING[suffix]
    raise UserError(f"{path}: no dataset that captune reads; a dataset is {READABLE}")


def _first_line_is_llava(path: AnyPath) -> bool:
    with unpacked(path)[0] as stream:
        line = stream.readline(_LONGEST_LINE).removeprefix(b"\xef\xbb\xbf")
    try:
        return is_row(parse_json(line))
    except ValueError:  # a reader of lines will say what is wrong with it
        return False
