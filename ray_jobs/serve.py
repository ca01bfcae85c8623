"""Answer over HTTP, OpenAI-compatible, in batches, on Ray Serve."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import signal
import threading

from pipelines.progress import say
from ray_jobs import _options, _start, cli


def main(argv: list[str]) -> int:
    """`captune serve --model DIR [--port N]`: serves until it is interrupted."""
    recipe, options = _options.parse(
        "serve",
        __doc__ or "",
        argv,
        lambda parser: (
            parser.add_argument("--model", type=str, help="merged model directory"),
            parser.add_argument("--port", type=int, default=8000, help="0 takes a free one"),
            parser.add_argument("--host", type=str, default="127.0.0.1", help="0.0.0.0 answers other machines, too"),
            parser.add_argument("--name", type=str, default="captune", help="the model's name in requests"),
        ),
    )
    model = Path(_options.required(options.model, "--model DIR", "serve"))
    with _start.ray_cluster():
        from serve import app

        base = app.start(model, recipe.serve, name=options.name, port=options.port, host=options.host)
        say(f"serving {model} at {base}/v1/chat/completions (health: {base}/health); Ctrl-C stops")
        done = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: done.set())
        done.wait()
        app.stop(options.name)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
