"""Quality metrics of a dataset's captions."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # started by its path: the repository, not this folder, is where imports begin
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json

from ray_jobs import _options, cli


def main(argv: list[str]) -> int:
    """`captune stats --input DIR_OR_DATASET --json`."""
    _, options = _options.parse(
        "stats",
        __doc__ or "",
        argv,
        lambda parser: (
            parser.add_argument("--input", type=str, help="records or any dataset"),
            parser.add_argument("--json", action="store_true", help="machine-readable"),
        ),
    )
    from pipelines.refine.metrics import stats

    found = stats(_options.required(options.input, "--input DIR_OR_DATASET", "stats"))
    print(json.dumps(found) if options.json else _table(found))
    return 0


def _table(found: dict, indent: str = "") -> str:
    """Nested figures, one a line."""
    lines = []
    for key, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", _table(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key:<28} {value:.4f}" if isinstance(value, float) else f"{indent}{key:<28} {value}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
