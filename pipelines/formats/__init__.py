"""One file per dataset format; each reads rows and, where it makes sense, writes records back.

`open_dataset(path)` looks at what lies at `path` and picks the reader. A row that cannot be used (a line that is no JSON, a row
without an image, a remote address) is still a row: it carries its `error`, so rows in equal rows out. Only a path that is no
dataset at all is a `UserError`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import UserError
from pipelines.formats.rows import Row, error_kind, to_record

__all__ = ["READABLE", "Dataset", "Row", "error_kind", "open_dataset", "to_record"]

READABLE = (
    "Data-Juicer JSONL (.jsonl), LLaVA JSON (.json), WebDataset tars (.tar), Parquet (.parquet), "
    "a folder of any one of these, or a folder of pictures"
)
_BY_SUFFIX = {
    ".jsonl": "datajuicer",
    ".ndjson": "datajuicer",
    ".json": "llava",
    ".parquet": "parquet",
    ".tar": "webdataset",
}
_MARKERS = (".stage.json", "MANIFEST.json")


@dataclass(frozen=True)
class Dataset:
    """A dataset on disk and the format it is in.

    Attributes:
        path: file or folder.
        format: name of the module in `pipelines.formats` that reads it.
    """

    path: Path
    format: str

    def rows(self) -> Iterator[Row]:
        """Rows in the order they lie in; never raises for one bad row.

        Raises:
            UserError: the file turns out not to be in this format at all.
        """
        rows: Iterator[Row] = importlib.import_module(f"pipelines.formats.{self.format}").rows(self.path)
        return rows

    def identity(self) -> str:
        """What the stage's fingerprint says about its input; see `pipelines.formats.identity`."""
        from pipelines.formats.identity import identity

        return identity(self.path)


def open_dataset(path: Path | str) -> Dataset:
    """Pick the format by what lies at `path`.

    Raises:
        UserError: nothing there, nothing captune reads, or another stage's unfinished output.
    """
    if "://" in str(path):
        raise UserError(f"{path}: captune reads datasets from local or mounted folders; download it first")
    path = Path(path).absolute()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; a dataset is {READABLE}")
    return _open_folder(path) if path.is_dir() else Dataset(path, _format_of_file(path))


def _format_of_file(path: Path) -> str:
    with path.open("rb") as stream:
        head = stream.read(4096)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"PAR1"):
        return "parquet"
    if head[257:262] == b"ustar":
        return "webdataset"
    if text.startswith(b"{") and path.suffix.lower() in (".json", ".jsonl", ".ndjson", ""):
        return "datajuicer"
    if text.startswith(b"[") and path.suffix.lower() in (".json", ""):
        return "llava"
    if path.suffix.lower() in _BY_SUFFIX:  # damaged or odd, but named: its reader will say what is wrong with it
        return _BY_SUFFIX[path.suffix.lower()]
    raise UserError(f"{path}: no dataset that captune reads; a dataset is {READABLE}")


def _open_folder(path: Path) -> Dataset:
    from pipelines.formats.imagefolder import METADATA, has_pictures

    if (path / _MARKERS[0]).exists() and not (path / _MARKERS[1]).exists():
        raise UserError(f"{path}: a captune stage writes or wrote here and is not finished; run that stage again first")
    for suffix in (".parquet", ".tar"):
        if any(path.glob(f"*{suffix}")):
            return Dataset(path, _BY_SUFFIX[suffix])
    jsonl = [p for p in sorted(path.glob("*.jsonl")) if p.name != METADATA]
    if len(jsonl) == 1 or (path / "dataset.jsonl") in jsonl:
        return Dataset(path / "dataset.jsonl" if len(jsonl) > 1 else jsonl[0], "datajuicer")
    if len(jsonl) > 1:
        raise UserError(
            f"{path}: holds several datasets ({', '.join(p.name for p in jsonl[:3])}, ...); name one of them"
        )
    if (path / METADATA).exists() or has_pictures(path):
        return Dataset(path, "imagefolder")
    raise UserError(f"{path}: no dataset in this folder; a dataset is {READABLE}")
