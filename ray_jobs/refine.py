"""Choose and clean captions with a Data-Juicer recipe on Ray Data."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from ray_jobs import _options, _start, cli


def main(argv: list[str]) -> int:
    """`captune refine --input DIR --output DIR --refine.recipe FILE`."""
    recipe, options = _options.parse("refine", __doc__ or "", argv, _options.input_output)
    from pipelines.refine import stage

    with _start.ray_cluster():
        stage.run(
            Path(_options.required(options.input, "--input DIR", "refine")),
            Path(_options.required(options.output, "--output DIR", "refine")),
            recipe.refine,
            restart=options.restart,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
