"""Merge an adapter and a trained projector into one plain model directory."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ray_jobs import _options, cli


def main(argv: list[str]) -> int:
    """`captune merge --model DIR --adapter DIR --output DIR`."""
    recipe, options = _options.parse(
        "merge",
        __doc__ or "",
        argv,
        lambda parser: (
            parser.add_argument("--model", type=str, help="base model (train.model)"),
            parser.add_argument("--adapter", type=str, help="what captune train wrote"),
            parser.add_argument("--output", type=str, help="directory to write"),
            parser.add_argument("--restart", type=bool, default=False, help="throw away another run's output"),
        ),
    )
    from pipelines.adapters import merge

    merge.run(
        Path(_options.required(options.model or recipe.train.model, "--model DIR", "merge")),
        Path(_options.required(options.adapter, "--adapter DIR", "merge")),
        Path(_options.required(options.output, "--output DIR", "merge")),
        recipe.merge,
        restart=options.restart,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
