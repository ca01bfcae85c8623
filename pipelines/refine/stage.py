"""Refine: which rows train the model. A Data-Juicer recipe inside Ray Data; every row ends up kept, or rejected with
its reason.

Small columns (ids, texts, verdicts) pass through the driver, which alone sees all rows and so finds duplicates. Images
never do: Ray Data reads them where an operator wants them, and one task per shard copies them to where they belong.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.connection import connect
from pipelines.errors import WorkFailed
from pipelines.formats import error_kind
from pipelines.manifest import MANIFEST, identity, open_stage, require_finished, write_json
from pipelines.overlapping import identity_of_rows, overlapping
from pipelines.progress import say
from pipelines.records import (
    SAME_PICTURE,
    Record,
    is_repeat,
    read_shards,
    shard_paths,
    source_id,
    text_id,
    write_shard,
)
from pipelines.refine.apply import Outcome
from pipelines.refine.config import RefineConfig
from pipelines.refine.operators import Operator, Process, build, read_recipe
from pipelines.refine.rowwise import run_stretch
from pipelines.refine.texts import MIX, SUBSET, Texts, choose, draw
from pipelines.refine.together import apply_together
from pipelines.same import digest
from pipelines.tasks import in_tasks
from pipelines.text import text_metrics, usable_texts

if TYPE_CHECKING:
    import pyarrow as pa


Outcomes = dict[str, Outcome]
"""What became of each text of each distinct sample, by `records.text_id`."""
SCREEN = ("error", "empty_text", "duplicate")
"""Reasons to reject a row before any operator sees it, in the order in which they are asked."""
BENCHMARK = "benchmark"
"""The reason between the first and the second of them, with `refine.without`: the benchmark's name and its picture."""


def run(
    input: Path | str, output: Path | str, config: RefineConfig, *, arm: str = "", restart: bool = False
) -> dict[str, Any]:
    """Refine the records in `input` into `output`.

    Writes `output/*.parquet` (kept records; the training text is the column `config.text`, as the recipe's mappers left
    it), `output/rejects/*.parquet`, `output/metrics.json` and the manifest. Shards mirror those of `input`; within a
    shard rows are ordered by `sample_id`. A sample of which several texts are judged (`refine.mix`, and captions that
    were made with `choose: all` or `keep_original`) has a row for each, in one place or the other. Killed halfway it
    starts over, because nothing in it is slow.

    Args:
        arm: name of the arm, for messages and the manifest.
        restart: throw away what another configuration left in `output`.

    Returns:
        The manifest.

    Raises:
        UserError: `input` holds no finished records, the recipe cannot be run, `output` holds another run.
        WorkFailed: every row failed (its image or an operator; being filtered out is no failure), an operator fails on
            rows in bulk, or rows got lost.
    """
    input, output = Path(input), Path(output)
    process = read_recipe(config.recipe) if config.recipe else []
    wanted = inputs(identity(input), process, config)
    require_finished(input)
    shards = shard_paths(input)
    if (output / MANIFEST).exists() and not restart:
        return open_stage(output, "refine", wanted).manifest  # complete, or refused as another run's
    # Before the directory is claimed: a recipe or a shard that is broken must not leave a claim behind.
    operators = build(process)
    columns = ["sample_id", "caption", "candidates", "recaption", "error", "meta"]
    table = read_shards(input, columns=columns, sort=False)
    stage = open_stage(output, "refine", wanted, restart=restart)
    _remove_leftovers(output)
    connect()

    what = f"refine {arm}".strip()
    outcomes = _screen(table, Texts(input, config), _shown(config))
    samples = table.num_rows + len(outcomes) - len(set(map(source_id, outcomes)))
    _run_recipe(process, operators, shards, table, outcomes, config, what)
    _refuse_all_failed(outcomes, input)
    if config.mix.by == "score":
        choose(outcomes, config.mix, f"arms.{arm}" if arm else "refine")
    if config.subset.rows:
        draw(outcomes, config.subset)
    kept, rejected = _write(shards, output, outcomes, config)
    if kept + rejected != samples:
        raise WorkFailed(f"{output}: {samples} rows came in, {kept} kept + {rejected} rejected went out")
    if kept == 0:
        say(f"{what}: nothing is left, every row was rejected; {output / 'rejects'} says why")
    facts = {
        "arm": arm,
        "text": config.text,
        "rows_in": table.num_rows,
        "samples": samples,
        "kept": kept,
        "rejected": rejected,
        "retention": round(kept / samples, 6) if samples else 0.0,
    }
    steps = [*_screens(config), *(operator.label for operator in operators), *_after(config)]
    write_json(
        output / "metrics.json", {**facts, **_metrics(table.sort_by("sample_id"), outcomes, samples, steps, what)}
    )
    return stage.finish(**facts, rows_digest=digest(output, config.text))


def inputs(records: str, process: Process, config: RefineConfig) -> dict[str, Any]:
    """Everything that decides what is kept; `records` is the identity of the directory that is refined."""
    wanted: dict[str, Any] = {"input": records, "text": config.text, "process": process}
    wanted |= {"mix": asdict(config.mix)} if config.mix.by != "none" else {}
    wanted |= {"without": identity_of_rows(config.without, "refine.without")} if config.without else {}
    return wanted | ({"subset": asdict(config.subset)} if config.subset.rows else {})


def _shown(config: RefineConfig) -> dict[str, str]:
    """`sample_id` -> the benchmark's picture that the sample shows, of `config.without`.

    Raises:
        UserError: that is no file of `captune overlap`.
    """
    if not config.without:
        return {}
    found = overlapping(config.without, "refine.without")
    return {row["sample_id"]: f"{found['benchmark']} {row['image_id']}" for row in found["rows"] if row["sample_id"]}


def _screens(config: RefineConfig) -> list[str]:
    first, *others = SCREEN
    return [first, *[BENCHMARK] * bool(config.without), *others]


def _after(config: RefineConfig) -> list[str]:
    """Steps that come after the operators."""
    return [MIX] * (config.mix.by == "score") + [SUBSET] * bool(config.subset.rows)


def _remove_leftovers(output: Path) -> None:
    """What a killed run left; its shards are whole, but nobody says that they are all."""
    for folder in (output, output / "rejects"):
        for path in [*folder.glob("*.parquet"), *folder.glob("*.part")]:
            path.unlink()


def _screen(table: pa.Table, texts: Texts, shown: dict[str, str]) -> Outcomes:
    """Outcome of every text of every distinct sample before any operator sees it, in the dataset's order. Rows that
    repeat a sample's id are counted when written; of rows with one picture and one text the first stays.
    """
    outcomes: Outcomes = {}
    pictures = _pictures(table)
    shared, texts_of = set(pictures.values()), set[tuple[str, str]]()
    for row in table.to_pylist():
        if row["sample_id"] in outcomes:
            continue
        if row["error"]:
            outcomes[row["sample_id"]] = outcome = Outcome("")
            outcome.reject("error", row["error"])
            continue
        if row["sample_id"] in shown:
            outcomes[row["sample_id"]] = outcome = Outcome(row["caption"] or "")
            outcome.reject(BENCHMARK, shown[row["sample_id"]])
            continue
        again = is_repeat(row["sample_id"])
        picture = pictures.get(row["sample_id"], row["sample_id"])
        for number, text in enumerate([*texts.of(row)][: 1 if again else None]):
            outcomes[text_id(row["sample_id"], number)] = outcome = Outcome(text)
            if not text.strip():
                outcome.step = outcome.reason = "empty_text"
            elif again or (picture, text) in texts_of:
                outcome.step = outcome.reason = "duplicate"
            elif picture in shared:
                texts_of.add((picture, text))
    return outcomes


def _pictures(table: pa.Table) -> dict[str, str]:
    """Samples with another one's picture -> that one."""
    import pyarrow.compute as pc

    marked = table.filter(pc.match_substring(table["meta"], f'"{SAME_PICTURE}"'))
    rows = zip(marked["sample_id"].to_pylist(), marked["meta"].to_pylist(), strict=True)
    return {sample: str(json.loads(meta).get(SAME_PICTURE, sample)) for sample, meta in rows}


def _run_recipe(
    process: Process,
    operators: Sequence[Operator],
    shards: Sequence[Path],
    table: pa.Table,
    outcomes: Outcomes,
    config: RefineConfig,
    what: str,
) -> None:
    """The operators in order: stretches of row-wise ones through Ray Data, global ones here, where all texts are."""
    for is_global, group in groupby(enumerate(operators), key=lambda step: step[1].kind == "global"):
        stretch = list(group)
        if is_global:
            for _, operator in stretch:
                apply_together(operator, outcomes, partial(_meta, table, outcomes))
        else:
            run_stretch(process, stretch, shards, outcomes, config, what)


def _meta(table: pa.Table, outcomes: Outcomes) -> dict[str, str]:
    """`meta` of the sample of each text."""
    of = dict(zip(table["sample_id"].to_pylist(), table["meta"].to_pylist(), strict=True))
    return {key: of[source_id(key)] for key in outcomes}


def _refuse_all_failed(outcomes: Outcomes, input: Path) -> None:
    failed = [outcome for outcome in outcomes.values() if outcome.failed]
    if outcomes and len(failed) == len(outcomes):
        each = ", ".join(f"{count} {kind}" for kind, count in Counter(map(_kind_of_reason, failed)).most_common())
        raise WorkFailed(f"{input}: every row failed: {each}; e.g. {(failed[0].reason or '')[:200]}")


def _write(shards: Sequence[Path], output: Path, outcomes: Outcomes, config: RefineConfig) -> tuple[int, int]:
    """Write kept and rejected records, one task per shard; returns the numbers of both."""
    import pyarrow.parquet as pq

    owner: dict[str, int] = {}
    texts: dict[str, Outcomes] = {}
    for key, outcome in outcomes.items():
        texts.setdefault(source_id(key), {})[key] = outcome

    def calls() -> Iterator[tuple[Any, ...]]:
        for number, shard in enumerate(shards):
            ids = pq.read_table(shard, columns=["sample_id"])["sample_id"].to_pylist()
            mine = {sample_id for sample_id in ids if owner.setdefault(sample_id, number) == number}
            yield shard, output, {sample_id: texts[sample_id] for sample_id in mine}, config

    done = list(in_tasks(_write_one, calls()))
    return sum(kept for kept, _ in done), sum(rejected for _, rejected in done)


def _write_one(shard: Path, output: Path, texts: dict[str, Outcomes], config: RefineConfig) -> tuple[int, int]:
    """Split one shard. `texts` holds the samples that this shard is the first to bring; the others are repeats."""
    kept: list[Record] = []
    rejected: list[Record] = []
    seen: set[str] = set()
    for record in _read_one(shard):
        sample_id = record["sample_id"]
        if sample_id not in texts or sample_id in seen:
            rejected.append({**record, "keep": False, "reject_reason": "duplicate"})
            continue
        seen.add(sample_id)
        for key, outcome in texts[sample_id].items():
            (kept if outcome.step is None else rejected).append(_record(record, key, outcome, config))
    write_shard(output / shard.name, kept)
    write_shard(output / "rejects" / shard.name, rejected)
    return len(kept), len(rejected)


def _record(record: Record, key: str, outcome: Outcome, config: RefineConfig) -> Record:
    """A record as one of its texts leaves it. Where only one text of a sample can be kept, that row has its id."""
    stats = json.dumps(json.loads(record["stats"] or "{}") | outcome.stats, sort_keys=True, ensure_ascii=False)
    changes: Any = {"stats": stats, "keep": outcome.step is None, "reject_reason": outcome.reason, "sample_id": key}
    if outcome.step is None:
        changes[config.text] = outcome.text
    if config.mix.by == "score":
        sample = record["sample_id"]
        changes["sample_id"] = sample if outcome.step is None else key if key != sample else f"{sample}.0"
    return {**record, **changes}


def _read_one(shard: Path) -> list[Record]:
    import pyarrow.parquet as pq

    records: list[Record] = pq.read_table(shard).sort_by("sample_id").to_pylist()
    return records


def _metrics(table: pa.Table, outcomes: Outcomes, samples: int, steps: Sequence[str], what: str) -> dict[str, Any]:
    """Funnel, reasons, and the quality of the captions before (as found) and after (kept rows, training text)."""
    rejected = Counter(outcome.step for outcome in outcomes.values() if outcome.step is not None)
    rejected["duplicate"] += samples - len(outcomes)
    reasons = Counter(_kind_of_reason(outcome) for outcome in outcomes.values() if outcome.step is not None)
    reasons["duplicate"] += samples - len(outcomes)
    funnel = []
    rows = samples
    for step in steps:
        funnel.append({"step": step, "rows_in": rows, "rows_out": rows - rejected[step], "rejected": rejected[step]})
        rows -= rejected[step]
        say(f"{what}: {step}: {funnel[-1]['rows_in']} -> {rows} rows")
    return {
        "funnel": funnel,
        "before": text_metrics(usable_texts(table["caption"].to_pylist(), table["error"].to_pylist())),
        "after": text_metrics([outcome.text for _, outcome in sorted(outcomes.items()) if outcome.step is None]),
        "reject_reasons": {reason: count for reason, count in sorted(reasons.items()) if count},
    }


def _kind_of_reason(outcome: Outcome) -> str:
    """Reasons without what is particular to a row: `error: missing file`, `duplicate`, `words_num_filter`."""
    if outcome.step == "error" and outcome.reason:
        return f"error: {error_kind(outcome.reason.removeprefix('error: '))}"
    return outcome.step or ""
