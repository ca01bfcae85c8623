"""The sample record: the one Arrow schema that flows down the hallway.

Images travel as encoded bytes or as a URI, never as pixels; rows in equal rows out, so a sample that fails carries its
`error`. `stats` and `meta` are JSON text because their keys differ from dataset to dataset while the schema must not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pipelines.errors import UserError
from pipelines.files import replacing
from pipelines.storage import AnyPath, files_in

if TYPE_CHECKING:
    import pyarrow as pa

SAME_PICTURE = "captune_same_picture_as"
"""Key of a record's `meta`: the `sample_id` of the first row with the same picture and another caption."""
COLUMNS = (
    "sample_id",
    "image",
    "image_uri",
    "caption",
    "candidates",
    "recaption",
    "keep",
    "reject_reason",
    "error",
    "stats",
    "meta",
)


class Record(TypedDict):
    """One image-text pair on its way down the hallway; see `schema` for the Arrow types."""

    sample_id: str
    image: bytes | None
    image_uri: str | None
    caption: str
    candidates: list[str]
    recaption: str | None
    keep: bool | None
    reject_reason: str | None
    error: str | None
    stats: str
    meta: str


def schema() -> pa.Schema:
    """Arrow schema of a record shard."""
    import pyarrow as pa

    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("image", pa.binary()),
            ("image_uri", pa.string()),
            ("caption", pa.string()),
            ("candidates", pa.list_(pa.string())),
            ("recaption", pa.string()),
            ("keep", pa.bool_()),
            ("reject_reason", pa.string()),
            ("error", pa.string()),
            ("stats", pa.string()),
            ("meta", pa.string()),
        ]
    )


def new_record(
    caption: str,
    *,
    image: bytes | None = None,
    image_uri: str | None = None,
    error: str | None = None,
    meta: dict[str, Any] | None = None,
    content: bytes | None = None,
    key: str = "",
) -> Record:
    """A fresh record. `content` is the encoded image when only its URI is kept; it goes into the id, not into the
    record. `key` is the id where it is known already.
    """
    return Record(
        sample_id=key or sample_id(content if content is not None else image, image_uri, caption),
        image=image,
        image_uri=image_uri,
        caption=caption,
        candidates=[],
        recaption=None,
        keep=None,
        reject_reason=None,
        error=error,
        stats="{}",
        meta=json.dumps(meta or {}, sort_keys=True, ensure_ascii=False, default=str),
    )


def sample_id(image: bytes | None, image_uri: str | None, caption: str) -> str:
    """Content key of a sample: 128-bit BLAKE2b over the encoded image and the caption as found, in hexadecimal.

    It does not depend on where the file lies, on the shard or on the row, so a rerun on another machine finds its own
    work again. When the image cannot be had at all, the file's name stands in for it.
    """
    return ids(image, image_uri, caption)[0]


def ids(image: bytes | None, image_uri: str | None, caption: str) -> tuple[str, str]:
    """`sample_id`, and the same key of the image alone, at the price of one."""
    digest = hashlib.blake2b(digest_size=16)
    if image is not None:
        digest.update(b"image\0" + image)
    else:
        digest.update(b"name\0" + Path(image_uri or "").name.encode("utf-8", "surrogateescape"))
    picture = digest.hexdigest()
    digest.update(b"\0caption\0" + caption.encode())
    return digest.hexdigest(), picture


def repeat_id(sample_id: str, number: int) -> str:
    """Id of the `number`-th row of a dataset with the same image and caption: the sample's own for the first."""
    return f"{sample_id}-{number}" if number > 1 else sample_id


def is_repeat(sample_id: str) -> bool:
    """Whether a row before this one has the same image and caption."""
    return "-" in sample_id


def text_id(sample_id: str, number: int) -> str:
    """Id of a row that one of several texts of a sample makes: the sample's own for the first."""
    return f"{sample_id}.{number}" if number else sample_id


def source_id(text_id: str) -> str:
    """The sample of a row."""
    return text_id.partition(".")[0]


def read_shards(directory: Path | str, columns: Iterable[str] | None = None, *, sort: bool = True) -> pa.Table:
    """All records of a directory of Parquet shards as one table, ordered by `sample_id` so that the shard layout never
    matters.

    Args:
        sort: False leaves them in the order of shards and rows, which is the dataset's as captioning writes them.

    Raises:
        UserError: no shard there, or a shard is truncated or has another schema (the file is named).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = shard_paths(directory)
    wanted = list(columns) if columns is not None else list(COLUMNS)
    tables = []
    for path in paths:
        try:
            missing = set(wanted) - set(pq.read_schema(path).names)
            if missing:
                lacks = ", ".join(sorted(missing))
                raise UserError(f"{path}: not a shard of sample records, it lacks the column(s) {lacks}")
            tables.append(pq.read_table(path, columns=wanted))
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: not a readable Parquet shard of sample records ({error})") from error
    table = pa.concat_tables(tables, promote_options="permissive")
    return table.sort_by("sample_id") if sort and "sample_id" in wanted else table


def holds_records(path: AnyPath) -> bool:
    """Whether `path` is a shard of sample records or a folder of them, as against anybody's Parquet.

    Raises:
        UserError: a file that is named like Parquet and is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = next((file for file in files_in(path, "*.parquet") if file.suffix == ".parquet"), None)
    if file is None:
        return False
    try:
        names = pq.read_schema(file if isinstance(file, Path) else file.open()).names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a readable Parquet file ({error})") from error
    return is_record(names)


def is_record(names: Iterable[str]) -> bool:
    """Whether these columns are a sample record's."""
    return {"sample_id", "image", "image_uri", "caption", "meta"} <= set(names)


def shard_paths(directory: Path | str) -> list[Path]:
    """Parquet shards directly inside `directory`, sorted by name."""
    paths = sorted(Path(directory).glob("*.parquet"))
    if not paths:
        raise UserError(f"{directory}: no Parquet shards of sample records there")
    return paths


def iter_records(directory: Path | str) -> Iterator[Record]:
    """Records of a directory one by one, ordered by `sample_id`."""
    yield from read_shards(directory).to_pylist()


def write_shard(path: Path, records: list[Record]) -> None:
    """Write one shard; the file appears under its name only when it is whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with replacing(path) as part:
        pq.write_table(pa.Table.from_pylist(list(records), schema=schema()), part, compression="zstd")
