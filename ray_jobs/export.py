"""Write kept records in another dataset format."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json

from ray_jobs import _options, cli


def main(argv: list[str]) -> int:
    """`captune export --input DIR --output FILE --format llava`."""
    _, options = _options.parse(
        "export",
        __doc__ or "",
        argv,
        lambda parser: (
            parser.add_argument("--input", type=str, help="records: a captions or a refined directory"),
            parser.add_argument("--output", type=str, help="file to write"),
            parser.add_argument("--format", type=str, default="llava", help="datajuicer, llava, webdataset or parquet"),
            parser.add_argument("--text", type=str, default="auto", help="column to write: auto, caption or recaption"),
        ),
    )
    from pipelines.formats.export import export

    found = export(
        _options.required(options.input, "--input DIR", "export"),
        _options.required(options.output, "--output FILE", "export"),
        options.format,
        options.text,
    )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
