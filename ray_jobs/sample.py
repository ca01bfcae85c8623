"""Draw the embedded sample world."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from ray_jobs import _ending, cli
from ray_jobs._options import RESTART, Command, Option, parse

COMMAND = Command(
    "sample",
    "Draw the sample world: badly captioned pictures, instructions, questions, and two small trained models.",
    (
        Option("--out", "DIR", "directory to write", key="sample.out", path=True, writes=True, needed=True),
        RESTART,
    ),
    reads=("sample",),
    first="--out",
    example="captune sample world --sample.pairs 200",
)


def main(argv: list[str]) -> int:
    """`captune sample DIR`."""
    recipe, options = parse(COMMAND, argv)
    from pipelines.sample.world import write_world

    manifest = write_world(options.out, recipe.sample, restart=options.restart)
    counts = manifest["counts"]
    made = (
        f"sample: {counts['pairs']} pairs, {counts['instructions']} instructions, {counts['questions']} questions and "
        f"two models, in {options.out}"
    )
    words = ("caption", f"{options.out}/dataset.jsonl", "--caption.model", f"{options.out}/models/blip2")
    return _ending.end(options, manifest, made, "captune", *words, "--output", "DIR")


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
