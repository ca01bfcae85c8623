"""Recaption an image-text dataset with BLIP-2 on Ray Data."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
from typing import TYPE_CHECKING

from ray_jobs import _options, _start, cli

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def main(argv: list[str]) -> int:
    """`captune caption --input DATASET --output DIR --caption.model DIR`; `--dry-run` needs no output and writes
    nothing.
    """
    recipe, options = _options.parse("caption", __doc__ or "", argv, _add_options)
    dataset = _options.required(options.input or recipe.dataset, "--input DATASET", "caption")
    if options.dry_run:
        from pipelines.caption.estimate import describe, estimate

        found = estimate(dataset, recipe.caption)
        print(json.dumps(found) if options.json else describe(found))
        return 0
    from pipelines.caption import stage

    with _start.ray_cluster():
        manifest = stage.run(
            dataset,
            Path(_options.required(options.output, "--output DIR", "caption")),
            recipe.caption,
            restart=options.restart,
        )
    if options.json:
        print(json.dumps(manifest))
    return 0


def _add_options(parser: ArgumentParser) -> None:
    _options.input_output(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what the run would cost; write nothing")
    parser.add_argument("--json", action="store_true", help="machine-readable, on standard output")


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
