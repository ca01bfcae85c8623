"""Ask a model the questions of a benchmark, through HTTP."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from collections.abc import Iterator
from contextlib import contextmanager

from ray_jobs import _options, _start, cli
from serve.config import ServeConfig


def main(argv: list[str]) -> int:
    """`captune evaluate --benchmark textvqa --annotations FILE --images DIR (--model DIR / --endpoint URL) --output
    DIR`.
    """
    recipe, options = _options.parse(
        "evaluate",
        __doc__ or "",
        argv,
        lambda parser: (
            parser.add_argument("--benchmark", type=str, help="textvqa (evaluate.benchmark)"),
            parser.add_argument("--annotations", type=str, help="annotation file (evaluate.annotations)"),
            parser.add_argument("--images", type=str, help="directory of pictures (evaluate.images)"),
            parser.add_argument(
                "--model", type=str, help="model directory; it is served for the time of the evaluation"
            ),
            parser.add_argument("--endpoint", type=str, help="URL of a running service, instead of --model"),
            parser.add_argument("--output", type=str, help="directory to write"),
            parser.add_argument("--restart", type=bool, default=False, help="throw away another run's output"),
        ),
    )
    from dataclasses import replace

    from pipelines.errors import UserError
    from pipelines.evaluate import stage
    from pipelines.modelfiles import model_identity

    named = {key: options[key] for key in ("benchmark", "annotations", "images") if options[key]}
    config = replace(recipe.evaluate, **named)
    output = Path(_options.required(options.output, "--output DIR", "evaluate"))
    if bool(options.model) == bool(options.endpoint):
        raise UserError("captune evaluate needs either --model DIR or --endpoint URL")
    if options.endpoint:
        stage.run(output, config, endpoint=options.endpoint, model_identity=options.endpoint, restart=options.restart)
        return 0
    model = Path(options.model)
    with _start.ray_cluster():
        stage.run(
            output,
            config,
            endpoint=lambda: served(model, recipe.serve),
            model_identity=model_identity(model),
            restart=options.restart,
        )
    return 0


@contextmanager
def served(model: Path, config: ServeConfig) -> Iterator[str]:
    """The base URL of `model`, served on a free port for the time of a `with` block."""
    from serve import app

    base = app.start(model, config, name="evaluate", port=0)
    try:
        yield base
    finally:
        app.stop("evaluate")


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
