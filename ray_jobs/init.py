"""Write a recipe for the data, models and machine at hand."""

from __future__ import annotations

if __name__ == "__main__":
    import _from_path  # noqa: F401

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from pipelines import machine, preflight
from pipelines.errors import UserError
from pipelines.files import write_text
from pipelines.formats.reading import columns_of
from ray_jobs import _ending, _plan, cli, run
from ray_jobs._options import COLUMNS, Command, Option, parse, reading, writing

COMMAND = Command(
    "init",
    "Look at a dataset, the models and this machine, and write a short recipe that passes preflight.",
    (
        reading("image-text pairs, in any format", "--dataset", value="DATASET"),
        reading("BLIP-2 that captions", "--blip2"),
        reading("MGM that is tuned", "--mgm"),
        reading("folder of TextVQA 0.5.1: annotations, Rosetta file, train_images", "--textvqa"),
        reading(
            "instructions in LLaVA's format; without them no LoRA is trained",
            "--instruct",
            "FILE",
            needed=False,
        ),
        COLUMNS,
        Option("--run-dir", "DIR", "where the run will write; default: runs/ and the recipe's name", path=True),
        writing("recipe file to write", value="FILE"),
    ),
    first="--dataset",
    example="captune init data/pairs.jsonl --blip2 models/blip2 --mgm models/mgm-2b --textvqa data/textvqa "
    "--output my.yaml",
)
_COUNT_SECONDS = 20.0
_ANNOTATIONS, _ROSETTA, _IMAGES = "TextVQA_0.5.1_val.json", "TextVQA_Rosetta_OCR_v0.2_val.json", "train_images"
_MICRO_BATCH, _ALIGN_BATCH, _INSTRUCT_BATCH = 8, 256, 128
"""Samples of a forward pass, and of an optimizer step (those of the published MGM-2B scripts)."""


@dataclass(frozen=True)
class _Size:
    """Rows of a dataset; `exact` when they were all counted."""

    format: str
    rows: int
    exact: bool

    def __str__(self) -> str:
        return f"{self.format}, {'' if self.exact else 'more than '}{self.rows:,} rows"


def main(argv: list[str]) -> int:
    """`captune init DATASET --blip2 DIR --mgm DIR --textvqa DIR --output my.yaml`."""
    _, options = parse(COMMAND, argv)
    output = Path(options.output)
    if output.exists():
        raise UserError(f"--output: {output} is there already; name another file, or remove it")
    preflight.require(_missing(options))
    text = _recipe(options)
    with tempfile.TemporaryDirectory() as place:
        draft = Path(place) / "recipe.yaml"
        draft.write_text(text, encoding="utf-8")
        preflight.require(_plan.problems(parse(run.COMMAND, [str(draft)])[0]))
    write_text(output, text)
    made = f"init: a recipe, {output}"
    return _ending.end(options, {"recipe": str(output)}, made, "captune", "run", str(output), "--dry-run")


def _missing(options: SimpleNamespace) -> list:
    """What the recipe could not be made from."""
    textvqa = Path(options.textvqa)
    return [
        *preflight.dataset(options.dataset, "--dataset"),
        *preflight.base_model(options.mgm, "--mgm"),
        *preflight.found("--textvqa", lambda: _file(textvqa / _ANNOTATIONS)),
        *(preflight.dataset(options.instruct, "--instruct") if options.instruct else ()),
    ]


def _file(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return path


def _size(path: str, columns: list[str]) -> _Size:
    """Rows of a dataset, as far as they can be counted in some seconds."""
    from pipelines.formats import Reading, open_dataset

    found, rows, until = open_dataset(path, Reading(columns_of(columns))), 0, time.monotonic() + _COUNT_SECONDS
    for _ in found.rows():
        rows += 1
        if rows % 256 == 0 and time.monotonic() > until:
            return _Size(found.format, rows, False)
    return _Size(found.format, rows, True)


def _recipe(options: SimpleNamespace) -> str:
    """The recipe's text."""
    pairs, cards = _size(options.dataset, options.columns), machine.cards()
    about = f"{len(cards)} x {cards[0].name}" if cards else "no card"
    lines = [
        f"# Written by captune init for {pairs}, and a machine of {machine.cpus()} CPUs, "
        f"{machine.memory() / 2**30:.0f} GiB and {about}.",
        f"run_dir: {_quoted(options.run_dir or Path('runs') / Path(options.output).stem)}",
        f"dataset: {_quoted(options.dataset)}",
        "",
        *_caption(options, len(cards)),
        "",
        "arms: # all that they differ in is the data",
        "  original: {text: caption}",
        "  enhanced: {text: recaption, recipe: refine_captions.yaml}",
        "",
        *_train(options, pairs, len(cards)),
        "",
        "serve:",
        *(["  gpus_per_replica: 1", "  dtype: bfloat16", "  max_batch_size: 32"] if cards else ["  max_batch_size: 8"]),
        "",
        *_evaluate(Path(options.textvqa)),
    ]
    return "\n".join(lines) + "\n"


def _caption(options: SimpleNamespace, cards: int) -> list[str]:
    """A replica on every card; without one, a replica that leaves the decoders a share of the CPUs."""
    return [
        "caption:",
        f"  model: {_quoted(options.blip2)}",
        "  max_new_tokens: 30",
        *([f"  actors: {cards}", "  gpus_per_actor: 1"] if cards else ["  cpus_per_actor: 0.9"]),
        *(["  reading:", "    columns:"] if options.columns else []),
        *(f"      {name}: {_quoted(column)}" for name, column in columns_of(options.columns).items()),
    ]


def _train(options: SimpleNamespace, pairs: _Size, cards: int) -> list[str]:
    """Once through the data, in samples as long as the language model takes."""
    from pipelines.modelfiles import read_object

    context = read_object(Path(options.mgm) / "config.json").get("text_config", {}).get("max_position_embeddings", 2048)
    workers = max(1, cards)
    share = max(1, min(4, machine.cpus() // (2 * workers)))
    lines = [
        "train:",
        f"  model: {_quoted(options.mgm)}",
        *([f"  instruct_data: {_quoted(options.instruct)}"] if options.instruct else []),
        *([f"  workers: {workers}", "  use_gpu: true", f"  cpus_per_worker: {share}"] if cards else []),
        f"  max_length: {min(2048, context)}",
        f"  # once through {'the' if pairs.exact else 'the first'} {pairs.rows:,} pairs",
        f"  align: {_phase(pairs.rows, _ALIGN_BATCH, workers)}",
    ]
    if options.instruct:
        rows = _size(options.instruct, []).rows
        lines += [f"  # once through {rows:,} instructions"]
        lines += [f"  instruct: {_phase(rows, _INSTRUCT_BATCH, workers)}"]
    return lines


def _evaluate(textvqa: Path) -> list[str]:
    """With the OCR tokens of the published scores, where their file is there."""
    rosetta = textvqa / _ROSETTA
    ocr = ["  ocr_tokens: false # published scores have them, from the Rosetta file"]
    if rosetta.is_file():
        ocr = ["  ocr_tokens: true # as published scores do; worth about 13 points", f"  ocr: {_quoted(rosetta)}"]
    return [
        "evaluate:",
        f"  annotations: {_quoted(textvqa / _ANNOTATIONS)}",
        f"  images: {_quoted(textvqa / _IMAGES)}",
        *ocr,
    ]


def _quoted(value: object) -> str:
    """As YAML writes a text, with quotes where it needs them."""
    import yaml

    return str(yaml.safe_dump(str(value), width=10_000)).split("\n")[0]


def _phase(rows: int, batch: int, workers: int) -> str:
    """Settings of a training phase that goes once through so many rows, at the rates of the original scripts."""
    accumulation = max(1, min(batch, rows) // (_MICRO_BATCH * workers))
    steps = max(1, rows // (_MICRO_BATCH * accumulation * workers))
    return f"{{steps: {steps}, batch: {_MICRO_BATCH * accumulation * workers}, micro_batch: {_MICRO_BATCH}}}"


if __name__ == "__main__":
    raise SystemExit(cli.guarded(main))
