"""Merge an adapter into its base model."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from pathlib import Path

from pipelines import preflight
from ray_jobs import _ending, cli
from ray_jobs._options import RESTART, Command, parse, reading, writing

COMMAND = Command(
    "merge",
    "Merge an adapter into its base model; nothing is written unless the logits agree.",
    (
        reading("what captune train wrote", "--adapter"),
        reading("base model", "--model", key="train.model"),
        writing(),
        RESTART,
    ),
    reads=("merge", "train.model"),
    first="--adapter",
    example="captune merge runs/x/enhanced/adapter --model models/mgm-2b --output merged",
)


def main(argv: list[str]) -> int:
    """`captune merge ADAPTER --model DIR --output DIR`."""
    recipe, options = parse(COMMAND, argv)
    preflight.require(
        [
            *preflight.base_model(options.model, "--model"),
            *preflight.adapter(options.adapter),
            *preflight.output(options.output, size=preflight.size_of(options.model), what="the merged weights"),
        ]
    )
    from pipelines.adapters import merge

    paths = (Path(options.model), Path(options.adapter), Path(options.output))
    manifest = merge.run(*paths, recipe.merge, restart=options.restart)
    made = f"merge: a plain model directory, in {options.output}"
    return _ending.end(options, manifest, made, "captune", "check", options.output)


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
