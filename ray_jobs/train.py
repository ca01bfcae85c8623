"""Align the projector on captions, then LoRA-tune the language model on instructions, on Ray Train."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from pathlib import Path

from pipelines import preflight
from ray_jobs import _ending, _start, cli
from ray_jobs._options import RESTART, Command, parse, reading, writing

COMMAND = Command(
    "train",
    "Align the projector on captions, then LoRA-tune the language model on instructions, on Ray Train. A killed run "
    "continues from its last checkpoint.",
    (
        reading("records, or image-text data in LLaVA's format", value="DATASET"),
        reading("base MGM", "--model", key="train.model"),
        writing("directory for the adapter"),
        RESTART,
    ),
    reads=("train", "assemble"),
    first="--input",
    example="captune train refined --model models/mgm-2b --output adapter --train.instruct_data data/instruct.json",
)


def main(argv: list[str]) -> int:
    """`captune train DATASET --model DIR --output DIR`."""
    recipe, options = parse(COMMAND, argv)
    demands = [recipe.train.demand()]
    made = recipe.assemble.wanted and not Path(options.model, "config.json").exists()
    preflight.require(
        [
            *preflight.dataset(options.input, "--input"),
            *(preflight.assemble(recipe.assemble) if made else ()),
            *preflight.train(recipe.train, options.model, made=made),
            *_start.lacking(demands=demands),
            *preflight.output(options.output),
        ]
    )
    from pipelines.train import stage

    if made:
        from pipelines.mgm import assemble

        assemble.run(recipe.assemble, options.model)
    with _start.ray_cluster(demands=demands):
        manifest = stage.run(
            Path(options.input), Path(options.model), Path(options.output), recipe.train, restart=options.restart
        )
    following = ("captune", "merge", options.output, "--model", options.model, "--output", "DIR")
    return _ending.end(options, manifest, f"train: an adapter, in {options.output}", *following)


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
