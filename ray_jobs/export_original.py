"""Turn an MGM in Hugging Face form back into an original checkpoint, bit for bit."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from ray_jobs import _ending, cli
from ray_jobs._options import Command, Option, parse, reading, writing

COMMAND = Command(
    "export-original",
    "Turn an MGM in Hugging Face form back into an original checkpoint, bit for bit.",
    (
        reading("MGM in Hugging Face form", "--model"),
        writing(),
        Option(
            "--towers",
            "true|false",
            "write the towers, too; left out: those that the converted checkpoint had inside",
            choices=("true", "false"),
        ),
    ),
    first="--model",
    example="captune export-original models/mgm-2b --output mgm-original",
)


def main(argv: list[str]) -> int:
    """`captune export-original DIR --output DIR [--towers true|false]`."""
    _, options = parse(COMMAND, argv)
    from pipelines.mgm.convert import export_original

    export_original(options.model, options.output, towers=options.towers and options.towers == "true")
    made = f"export-original: a checkpoint in the original's layout, in {options.output}"
    return _ending.end(options, {"output": options.output}, made)


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
