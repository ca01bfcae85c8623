"""Align the projector on captions, then LoRA-tune the language model on instructions, on Ray Train."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

from pathlib import Path
from types import SimpleNamespace

from pipelines import preflight
from pipelines.train.config import TrainConfig
from ray_jobs import _ending, _start, cli
from ray_jobs._options import RESTART, Command, Option, parse, reading, required, writing

COMMAND = Command(
    "train",
    "Align the projector on captions, then LoRA-tune the language model on instructions, on Ray Train. A killed run "
    "continues from its last checkpoint.",
    (
        reading("records, or image-text data in LLaVA's format", value="DATASET", needed=False),
        reading("base MGM; its config.json is enough for --dry-run", "--model", key="train.model"),
        writing("directory for the adapter", needed=False),
        Option("--dry-run", about="say what memory each phase takes, and whether it fits the card; train nothing"),
        RESTART,
    ),
    reads=("train", "assemble"),
    first="--input",
    example="captune train refined --model models/mgm-2b --output adapter --train.instruct_data data/instruct.json",
)


def main(argv: list[str]) -> int:
    """`captune train DATASET --model DIR --output DIR`."""
    recipe, options = parse(COMMAND, argv)
    if options.dry_run:
        return _dry_run(recipe.train, options)
    options.input = required(options.input, "--input DATASET", "train")
    options.output = required(options.output, "--output DIR", "train")
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


def _dry_run(config: TrainConfig, options: SimpleNamespace) -> int:
    """The memory of each phase: 0 when all of it fits, otherwise 1."""
    from pipelines.train import forecast

    data = {"align": options.input or ""} if config.align.steps else {}
    if config.instruct.steps:
        data["instruct"] = config.instruct_data or ""
    found = forecast.forecast(config, options.model, data)
    name, capacity = forecast.card()
    phases = {each.phase: each.as_json() for each in found}
    result = {"card": name, "card_gib": round(capacity / forecast.GIB, 2), "phases": phases}
    _ending.tell(options, result, forecast.describe(found, config))
    return 0 if all(each.fits for each in found) else 1


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
