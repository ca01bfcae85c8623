"""Align the projector on captions, then LoRA-tune the language model on instructions, on Ray Train."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from jsonargparse import ArgumentParser

from ray_jobs import _options, _start, cli


def main(argv: list[str]) -> int:
    """`captune train --input DIR --model DIR --output DIR`."""
    recipe, options = _options.parse(
        "train",
        __doc__ or "",
        argv,
        _add_options,
    )
    from pipelines.train import stage as loop

    with _start.ray_cluster():
        loop.run(
            Path(_options.required(options.input, "--input DIR", "train")),
            Path(_options.required(options.model or recipe.train.model, "--model DIR", "train")),
            Path(_options.required(options.output, "--output DIR", "train")),
            recipe.train,
            restart=options.restart,
        )
    return 0


def _add_options(parser: ArgumentParser) -> None:
    _options.input_output(parser)
    parser.add_argument("--model", type=str, help="base MGM (train.model)")


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
