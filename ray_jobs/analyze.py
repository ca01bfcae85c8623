"""What filters measure in a dataset, and bounds for them that are not guesses."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from pathlib import Path
from typing import TYPE_CHECKING

from pipelines import preflight
from pipelines.files import write_text
from pipelines.manifest import write_json
from pipelines.progress import say
from ray_jobs import _ending, cli
from ray_jobs._options import COLUMNS, Command, parse, reading, reading_of, writing
from ray_jobs.recipe import RECIPES

if TYPE_CHECKING:
    from pipelines.refine.analysis import Analysis

COMMAND = Command(
    "analyze",
    "What the filters of a Data-Juicer recipe (refine.recipe; else the one that comes with captune) measure in a "
    "dataset: distributions, which filter costs which rows, the rows at each bound, and other bounds by quantile, "
    "standard deviations, or the share of rows to keep.",
    (
        reading("records, or a dataset in any format that captune caption reads", value="DATASET"),
        COLUMNS,
        writing(
            "directory for the page, analysis.json and recipe.yaml, a recipe with the proposed bounds", needed=False
        ),
    ),
    reads=("analyze", "refine.recipe", "refine.text", "caption.reading"),
    first="--input",
    example="captune analyze data/pairs.jsonl --output analysis --analyze.keep 0.584",
)


def main(argv: list[str]) -> int:
    """`captune analyze DATASET [--output DIR]`."""
    recipe, options = parse(COMMAND, argv)
    filters = recipe.refine.recipe or str(RECIPES / "refine_captions.yaml")
    preflight.require([*preflight.refine(recipe.refine), *(preflight.output(options.output) if options.output else ())])
    from pipelines.refine.analysis import analyze
    from pipelines.report import analysis

    found = analyze(options.input, filters, recipe.analyze, recipe.refine, reading_of(recipe, options))
    status = _ending.tell(options, found.facts, analysis.table(found.facts))
    if options.output:
        _write(Path(options.output), found, analysis.page(found))
    return status


def _write(output: Path, found: Analysis, page: str) -> None:
    import yaml

    facts = found.facts
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "analysis.json", facts)
    write_text(output / "index.html", page)
    head = (
        f"# {facts['recipe']} with bounds from {facts['looked_at']:,} of {facts['rows']:,} rows of\n"
        f"# {facts['input']}, by {facts['proposed']['by']} {facts['proposed']['value']:g}: of these rows they keep "
        f"{100 * facts['proposed']['kept']:.1f} %.\n"
    )
    write_text(output / "recipe.yaml", head + yaml.safe_dump({"process": found.proposal}, sort_keys=False))
    say(f"analyze: {output / 'index.html'}; captune refine ... --refine.recipe {output / 'recipe.yaml'}")


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
