"""Answer over HTTP, OpenAI-compatible, in batches, on Ray Serve."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

import signal
import threading
from pathlib import Path

from pipelines import connection, preflight
from pipelines.progress import say
from ray_jobs import _ending, _start, cli
from ray_jobs._options import Command, Option, parse, reading
from serve.port import free_port, refuse_impossible

COMMAND = Command(
    "serve",
    "Answer over HTTP, OpenAI-compatible, in batches, on Ray Serve, until it is interrupted.",
    (
        reading("merged model", "--model"),
        Option("--adapter", "DIR", "what captune train wrote for it, to answer with unmerged", path=True),
        Option("--port", "N", "0 takes a free one", number=True, default=8000),
        Option("--host", "ADDRESS", "0.0.0.0 answers other machines, too", default="127.0.0.1"),
        Option("--name", "NAME", "the model's name in requests", default="captune"),
    ),
    reads=("serve",),
    first="--model",
    example="captune serve runs/sample/enhanced/merged --port 8000",
)


def main(argv: list[str]) -> int:
    """`captune serve DIR [--adapter DIR] [--port N]`: serves until it is interrupted."""
    recipe, options = parse(COMMAND, argv)
    model = Path(options.model)
    demands = [recipe.serve.demand()]
    # On a cluster that runs already, the port may be its Ray Serve's.
    look = refuse_impossible if _start.address() else free_port
    preflight.require(
        [
            *preflight.base_model(options.model, "--model"),
            *(preflight.adapter(options.adapter) if options.adapter else ()),
            *preflight.found("--port", lambda: look(options.host, options.port)),
            *_start.lacking(demands=demands),
        ]
    )
    with _start.ray_cluster(demands=demands):
        connection.connect()
        from serve import app

        adapter = Path(options.adapter) if options.adapter else None
        place = {"name": options.name, "port": options.port, "host": options.host}
        base = app.start(model, recipe.serve, adapter=adapter, **place)
        what = f"{model} with {adapter}" if adapter else str(model)
        say(f"serving {what} at {base}/v1/chat/completions (health: {base}/health); Ctrl-C stops")
        if options.json:
            _ending.tell(options, {"model": str(model), "name": options.name, "url": base}, "")
        done = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: done.set())
        done.wait()
        app.stop(options.name)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
