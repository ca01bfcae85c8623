"""Score answers made elsewhere."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from pipelines.evaluate.registry import BENCHMARKS
from ray_jobs import _ending, cli
from ray_jobs._options import Command, Option, parse, reading

COMMAND = Command(
    "score",
    "Score answers made elsewhere, without asking anything; --json has every question's score.",
    (
        reading("answers, in a format of the benchmark", "--predictions", "FILE"),
        reading("the benchmark's annotation file", "--annotations", "FILE", key="evaluate.annotations"),
        Option("--benchmark", "NAME", ", ".join(BENCHMARKS), key="evaluate.benchmark"),
    ),
    reads=("evaluate.benchmark", "evaluate.annotations"),
    first="--predictions",
    example="captune score predictions.jsonl --annotations TextVQA_0.5.1_val.json",
)


def main(argv: list[str]) -> int:
    """`captune score FILE --annotations FILE`."""
    _, options = parse(COMMAND, argv)
    from pipelines.evaluate.stage import score, sentence

    found = score(options.benchmark, options.annotations, options.predictions)
    return _ending.tell(options, found, sentence(found))


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
