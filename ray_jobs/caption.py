"""Recaption an image-text dataset with BLIP-2 on Ray Data."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from pathlib import Path

from pipelines import preflight
from ray_jobs import _ending, _start, cli
from ray_jobs._options import COLUMNS, RESTART, Command, Option, parse, reading, reading_of, required, writing

COMMAND = Command(
    "caption",
    "Recaption an image-text dataset with BLIP-2 on Ray Data. A killed run continues; a dataset that has grown is "
    "captioned on.",
    (
        reading("JSONL, LLaVA or COCO JSON, tars, Parquet or pictures", value="DATASET", key="dataset"),
        COLUMNS,
        writing("directory for the records", needed=False),
        Option("--dry-run", about="say what the run would cost; needs no --output and writes nothing"),
        RESTART,
    ),
    reads=("dataset", "caption"),
    first="--input",
    example="captune caption data/pairs.jsonl --output captions --caption.model Salesforce/blip2-opt-2.7b",
)


def main(argv: list[str]) -> int:
    """`captune caption DATASET --output DIR --caption.model DIR`."""
    recipe, options = parse(COMMAND, argv)
    recipe.caption.reading = reading_of(recipe, options)
    if options.dry_run:
        from pipelines.caption.estimate import describe, estimate

        found = estimate(recipe.dataset, recipe.caption)
        return _ending.tell(options, found, describe(found))
    output = required(options.output, "--output DIR", "caption")
    preflight.require(
        [
            *preflight.dataset(recipe.dataset, "--input"),
            *preflight.caption(recipe.caption),
            *_start.lacking(recipe.caption),
            *preflight.output(output),
        ]
    )
    from pipelines.caption import stage

    with _start.ray_cluster(recipe.caption):
        manifest = stage.run(recipe.dataset, Path(output), recipe.caption, restart=options.restart)
    made = f"caption: {manifest['captioned']} of {manifest['rows_in']} rows captioned, in {output}"
    return _ending.end(options, manifest, made, "captune", "refine", output, "--output", "DIR")


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
