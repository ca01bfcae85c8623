"""What training data and a benchmark have in common."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from pathlib import Path

from pipelines import preflight
from pipelines.evaluate.registry import BENCHMARKS
from pipelines.files import write_text
from pipelines.manifest import write_json
from pipelines.progress import say
from ray_jobs import _ending, cli
from ray_jobs._options import COLUMNS, Command, Option, parse, reading_of, writing

COMMAND = Command(
    "overlap",
    "Which rows of training data (pairs, instructions, records) show a benchmark's pictures, whatever their size, "
    "format and quality, and which hold its questions' words. refine.without leaves such rows out, compare.overlap "
    "gives the verdict without such questions.",
    (
        Option("--datasets", "DATASET", "training data, in any format", needed=True, many=True),
        COLUMNS,
        Option("--benchmark", "NAME", ", ".join(BENCHMARKS), key="evaluate.benchmark"),
        Option("--annotations", "FILE", "the benchmark's annotation file", key="evaluate.annotations", path=True),
        Option("--images", "DIR", "its pictures", key="evaluate.images", path=True),
        writing("directory for overlap.json and a page", needed=False),
    ),
    reads=("overlap", "evaluate", "caption.reading"),
    first="--datasets",
    example="captune overlap pairs.jsonl instruct.json --annotations TextVQA_0.5.1_val.json --images train_images "
    "--output overlap",
)


def main(argv: list[str]) -> int:
    """`captune overlap DATASET [DATASET ...] --annotations FILE --images DIR [--output DIR]`."""
    recipe, options = parse(COMMAND, argv)
    output = preflight.output(options.output) if options.output else ()
    preflight.require([*preflight.evaluate(recipe.evaluate), *output])
    from pipelines.overlap.find import find
    from pipelines.report import overlap

    datasets = [str(Path(name).expanduser()) for name in options.datasets]
    found = find(datasets, recipe.evaluate, recipe.overlap, reading_of(recipe, options))
    status = _ending.tell(options, found.facts, overlap.table(found.facts))
    if options.output:
        directory = Path(options.output)
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "overlap.json", found.facts)
        write_text(directory / "index.html", overlap.page(found))
        say(f"overlap: {directory / 'index.html'}")
    return status


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
