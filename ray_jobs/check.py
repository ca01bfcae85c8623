"""Check a model, or an adapter against its base."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
from dataclasses import asdict

from ray_jobs import _options, cli


def main(argv: list[str]) -> int:
    """`captune check --model DIR [--adapter DIR]`: exit status 1 when a check fails."""
    _, options = _options.parse(
        "check",
        __doc__ or "",
        argv,
        lambda parser: (
            parser.add_argument("--model", type=str, help="model directory"),
            parser.add_argument("--adapter", type=str, help="adapter directory; --model is then its base"),
            parser.add_argument("--json", action="store_true", help="machine-readable"),
        ),
    )
    from pipelines.adapters.check import check_adapter, check_model

    model = _options.required(options.model, "--model DIR", "check")
    verdicts = check_adapter(options.adapter, model) if options.adapter else check_model(model)
    if options.json:
        print(json.dumps([asdict(verdict) for verdict in verdicts]))
    else:
        for verdict in verdicts:
            print(f"{'ok  ' if verdict.passed else 'FAIL'}  {verdict.name}: {verdict.detail}")
    return 0 if all(verdict.passed for verdict in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
