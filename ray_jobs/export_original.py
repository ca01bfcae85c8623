"""Turn a Hugging Face MGM directory back into an original checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ray_jobs import _options, cli


def main(argv: list[str]) -> int:
    """`captune export-original --model DIR --output DIR [--towers true|false]`."""
    _, options = _options.parse(
        "export-original",
        __doc__ or "",
        argv,
        lambda parser: (
            parser.add_argument("--model", type=str, help="MGM in Hugging Face form"),
            parser.add_argument("--output", type=str, help="directory to write"),
            parser.add_argument(
                "--towers",
                type=bool,
                help="write the towers too; left out: those that the converted checkpoint had inside",
            ),
        ),
    )
    from pipelines.mgm.convert import export_original

    export_original(
        _options.required(options.model, "--model DIR", "export-original"),
        _options.required(options.output, "--output DIR", "export-original"),
        towers=options.towers,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
