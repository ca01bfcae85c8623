"""Recaption an image-text dataset with BLIP-2 on Ray Data."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ray_jobs import _options, _start, cli


def main(argv: list[str]) -> int:
    """`captune caption --input DATASET --output DIR --caption.model DIR`."""
    recipe, options = _options.parse("caption", __doc__ or "", argv, _options.input_output)
    from pipelines.caption import stage

    with _start.ray_cluster():
        stage.run(
            _options.required(options.input or recipe.dataset, "--input DATASET", "caption"),
            Path(_options.required(options.output, "--output DIR", "caption")),
            recipe.caption,
            restart=options.restart,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
