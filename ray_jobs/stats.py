"""Quality metrics of a dataset's captions."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from ray_jobs import _ending, cli
from ray_jobs._options import COLUMNS, Command, parse, reading, reading_of

COMMAND = Command(
    "stats",
    "Quality metrics of a dataset's captions: how varied they are, how long, and how much they repeat themselves.",
    (reading("records, or a dataset in any format that captune caption reads", value="DATASET"), COLUMNS),
    reads=("caption.reading",),
    first="--input",
    example="captune stats runs/sample/captions --json",
)


def main(argv: list[str]) -> int:
    """`captune stats DATASET`."""
    recipe, options = parse(COMMAND, argv)
    from pipelines.refine.metrics import stats

    found = stats(options.input, reading_of(recipe, options))
    return _ending.tell(options, found, _table(found))


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
