"""Ask a model the questions of a benchmark, through HTTP."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from pipelines import connection, preflight
from pipelines.errors import UserError
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.registry import BENCHMARKS
from ray_jobs import _ending, _start, cli
from ray_jobs._options import RESTART, Command, Option, parse, reading, writing
from serve.config import ServeConfig

_IN_RECIPE = "; NAME= where there are several; in a recipe evaluate.{0}, evaluate.also.NAME.{0}"
COMMAND = Command(
    "evaluate",
    "Ask a model the questions of a benchmark, over HTTP, many at a time, and score the answers.",
    (
        reading("model; it is served for the time of the evaluation", "--model", needed=False),
        Option("--endpoint", "URL", "a running service, instead of --model"),
        writing("directory for answers and scores; of several benchmarks, a directory each in it"),
        Option("--benchmark", "NAME[,NAME...]", ", ".join(BENCHMARKS), key="evaluate.benchmark"),
        Option(
            "--annotations",
            "[NAME=]FILE",
            f"a benchmark's annotation file{_IN_RECIPE.format('annotations')}",
            many=True,
        ),
        Option("--images", "[NAME=]DIR", f"its pictures{_IN_RECIPE.format('images')}", many=True),
        RESTART,
    ),
    reads=("evaluate", "serve"),
    first="--model",
    example="captune evaluate merged --output scores --annotations TextVQA_0.5.1_val.json --images train_images",
)


def main(argv: list[str]) -> int:
    """`captune evaluate DIR --annotations FILE --images DIR --output DIR`, or with `--endpoint URL` instead of DIR; of
    several benchmarks `--benchmark pope,vqav2 --annotations pope=DIR --annotations vqav2=FILE ...`, all asked of one
    service.
    """
    recipe, options = parse(COMMAND, argv)
    from pipelines.evaluate import stage

    config, output = _with_files(recipe.evaluate, options), Path(options.output)
    if bool(options.model) == bool(options.endpoint):
        raise UserError("captune evaluate needs either --model DIR or --endpoint URL")
    preflight.require(
        [
            *(lack for name, each in config.each().items() for lack in preflight.evaluate(each, key=config.key(name))),
            *(preflight.base_model(options.model, "--model") if options.model else ()),
            *(_start.lacking(demands=[recipe.serve.demand()]) if options.model else ()),
            *preflight.output(output),
        ]
    )
    model, found = Path(options.model or ""), {}
    with stage.kept(served(model, recipe.serve)) as service:
        for name, each in config.each().items():
            place = output / name if config.also else output
            endpoint = options.endpoint or stage.Served(model, service)
            found[name] = stage.run(place, each, endpoint, restart=options.restart)
            if not options.json:
                print(stage.sentence(found[name]), flush=True)
    made = f"evaluate: answers and scores in {output}"
    result = found if config.also else found[config.benchmark]
    following = () if config.also else ("captune", "compare", "OTHER", str(output), "--output", "DIR")
    return _ending.end(options, result, made, *following)


def _with_files(config: EvaluateConfig, options: SimpleNamespace) -> EvaluateConfig:
    """The section with the files of the command line; one without a name is the first benchmark's.

    Raises:
        UserError: a file for a benchmark that is not asked.
    """
    names = list(config.each())
    for key in ("annotations", "images"):
        for argument in getattr(options, key):
            name, given, path = argument.partition("=")
            if not given or "/" in name or Path(argument).exists():
                name, path = config.benchmark, argument
            if name not in names:
                raise UserError(f"--{key} {argument}: --benchmark names {', '.join(names)}, and not '{name}'")
            own = {key: os.path.expanduser(path)}
            if name == config.benchmark:
                config = replace(config, **own)
            else:
                config = replace(config, also=config.also | {name: config.also[name] | own})
    return config


_starting = threading.Lock()
"""Serve's own start takes no second one beside it."""
_blocks: list[None] = []


@contextmanager
def served(model: Path, config: ServeConfig, name: str = "") -> Iterator[str]:
    """The base URL of `model`, served on a free port for the time of a `with` block, on a Ray that starts no sooner.

    Args:
        name: of what is asked, where several models are served at once.
    """
    name, route = (f"evaluate-{name}", f"/evaluate/{name}") if name else ("evaluate", "/")
    with _start.ray_cluster(demands=[config.demand()]), serving():
        connection.connect()
        from serve import app

        with _starting:
            base = app.start(model, config.private(), name=name, route_prefix=route, port=0)
        try:
            yield base
        finally:
            app.stop(name, last=False)


@contextmanager
def serving() -> Iterator[None]:
    """Ray Serve, started by the first of the models that are served inside of the outermost such block, stays until its
    end.
    """
    _blocks.append(None)
    try:
        yield
    finally:
        _blocks.pop()
        if not _blocks and "serve.app" in sys.modules:
            sys.modules["serve.app"].shutdown()


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
