"""Write kept records as another tool's dataset."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

import json

from pipelines.progress import say
from ray_jobs import cli
from ray_jobs._options import Command, Option, parse, reading, writing

COMMAND = Command(
    "export",
    "Write the kept records of a captions or a refined directory as another tool's dataset. What was written is told "
    "in JSON, with or without --json.",
    (
        reading("records: what captune caption or refine wrote"),
        writing("file to write", "FILE"),
        Option(
            "--format",
            "FORMAT",
            "of the file",
            choices=("llava", "datajuicer", "webdataset", "parquet"),
            default="llava",
        ),
        Option("--text", "COLUMN", "to write", choices=("auto", "caption", "recaption"), default="auto"),
    ),
    first="--input",
    example="captune export runs/sample/enhanced/dataset --output enhanced.json --format llava",
)


def main(argv: list[str]) -> int:
    """`captune export DIR --output FILE --format llava`."""
    _, options = parse(COMMAND, argv)
    from pipelines.formats.export import export

    found = export(options.input, options.output, options.format, options.text)
    say(f"export: {found['written']} of {found['rows_in']} rows as {options.format}, in {options.output}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
