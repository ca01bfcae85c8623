"""Score answers made elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json

from ray_jobs import _options, cli


def main(argv: list[str]) -> int:
    """`captune score --benchmark textvqa --annotations FILE --predictions FILE --json`."""
    recipe, options = _options.parse(
        "score",
        __doc__ or "",
        argv,
        lambda parser: (
            parser.add_argument("--benchmark", type=str, default="textvqa", help="textvqa"),
            parser.add_argument("--annotations", type=str, help="annotation file"),
            parser.add_argument("--predictions", type=str, help="answers, in a format of the benchmark"),
            parser.add_argument("--json", action="store_true", help="machine-readable, with every question's score"),
        ),
    )
    from pipelines.evaluate.stage import score

    found = score(
        options.benchmark,
        _options.required(options.annotations or recipe.evaluate.annotations, "--annotations FILE", "score"),
        _options.required(options.predictions, "--predictions FILE", "score"),
    )
    if options.json:
        print(json.dumps(found))
    else:
        print(
            f"{found['benchmark']}: {100 * found['accuracy']:.2f} % of {found['count']} questions, "
            f"{found['errors']} errors"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
