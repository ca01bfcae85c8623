"""Ask a model the questions of a benchmark, through HTTP."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines import connection, preflight
from pipelines.evaluate.registry import BENCHMARKS
from ray_jobs import _ending, _start, cli
from ray_jobs._options import RESTART, Command, Option, parse, reading, writing
from serve.config import ServeConfig

COMMAND = Command(
    "evaluate",
    "Ask a model the questions of a benchmark, over HTTP, many at a time, and score the answers.",
    (
        reading("model; it is served for the time of the evaluation", "--model", needed=False),
        Option("--endpoint", "URL", "a running service, instead of --model"),
        writing("directory for answers and scores"),
        Option("--benchmark", "NAME", ", ".join(BENCHMARKS), key="evaluate.benchmark"),
        reading("the benchmark's annotation file", "--annotations", "FILE", key="evaluate.annotations", needed=False),
        reading("its pictures", "--images", key="evaluate.images", needed=False),
        RESTART,
    ),
    reads=("evaluate", "serve"),
    first="--model",
    example="captune evaluate merged --output scores --annotations TextVQA_0.5.1_val.json --images train_images",
)


def main(argv: list[str]) -> int:
    """`captune evaluate DIR --annotations FILE --images DIR --output DIR`, or with `--endpoint URL` instead of DIR."""
    recipe, options = parse(COMMAND, argv)
    from pipelines.errors import UserError
    from pipelines.evaluate import stage

    config, output = recipe.evaluate, Path(options.output)
    if bool(options.model) == bool(options.endpoint):
        raise UserError("captune evaluate needs either --model DIR or --endpoint URL")
    preflight.require(
        [
            *preflight.evaluate(config),
            *(preflight.base_model(options.model, "--model") if options.model else ()),
            *(_start.lacking(demands=[recipe.serve.demand()]) if options.model else ()),
            *preflight.output(output),
        ]
    )
    if options.endpoint:
        manifest = stage.run(output, config, options.endpoint, restart=options.restart)
    else:
        model = Path(options.model)
        endpoint = stage.Served(model, served(model, recipe.serve))
        manifest = stage.run(output, config, endpoint, restart=options.restart)
    if not options.json:
        print(stage.sentence(manifest), flush=True)
    made = f"evaluate: answers and scores in {output}"
    return _ending.end(options, manifest, made, "captune", "compare", "OTHER", str(output), "--output", "DIR")


@contextmanager
def served(model: Path, config: ServeConfig) -> Iterator[str]:
    """The base URL of `model`, served on a free port for the time of a `with` block, on a Ray that starts no sooner."""
    with _start.ray_cluster(demands=[config.demand()]):
        connection.connect()
        from serve import app

        base = app.start(model, config, name="evaluate", port=0)
        try:
            yield base
        finally:
            app.stop("evaluate")


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
