"""Draw the embedded sample world."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ray_jobs import _options, cli


def main(argv: list[str]) -> int:
    """`captune sample --out DIR`."""
    recipe, options = _options.parse(
        "sample",
        "Draw the sample world: 1,000 badly captioned pictures, instructions, questions, and small trained models.",
        argv,
        lambda parser: (
            parser.add_argument("--out", type=str, help="directory to write"),
            parser.add_argument("--restart", type=bool, default=False, help="throw away another run's output"),
        ),
    )
    from pipelines.sample.world import write_world

    write_world(
        _options.required(options.out or recipe.sample.out, "--out DIR", "sample"),
        recipe.sample,
        restart=options.restart,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
