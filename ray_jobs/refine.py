"""Choose and clean captions with a Data-Juicer recipe on Ray Data."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from pathlib import Path

from pipelines import preflight
from ray_jobs import _ending, _start, cli
from ray_jobs._options import RESTART, Command, parse, reading, writing

COMMAND = Command(
    "refine",
    "Choose and clean captions with a Data-Juicer recipe on Ray Data; every row is kept, or rejected with its reason.",
    (reading("records: what captune caption wrote"), writing(), RESTART),
    reads=("refine",),
    first="--input",
    example="captune refine captions --output refined --refine.recipe refine_captions.yaml",
)


def main(argv: list[str]) -> int:
    """`captune refine DIR --output DIR --refine.recipe FILE`."""
    recipe, options = parse(COMMAND, argv)
    demands = [recipe.refine.demand()]
    preflight.require(
        [
            *preflight.records(options.input),
            *preflight.refine(recipe.refine),
            *_start.lacking(demands=demands),
            *preflight.output(options.output),
        ]
    )
    from pipelines.refine import stage

    with _start.ray_cluster(demands=demands):
        manifest = stage.run(Path(options.input), Path(options.output), recipe.refine, restart=options.restart)
    made = f"refine: {manifest['kept']} of {manifest['rows_in']} rows kept, in {options.output}"
    return _ending.end(options, manifest, made, "captune", "train", options.output, "--model", "DIR", "--output", "DIR")


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
