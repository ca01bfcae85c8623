"""What was compared: a card per stage for the drawing of the hallway, and where everything came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.evaluate.registry import title
from pipelines.manifest import training_text
from pipelines.report import numbers
from pipelines.rundir import Run, Stage, Walk
from pipelines.train.log import read_log


@dataclass(frozen=True)
class Card:
    """A stage in the drawing. `state` is `done`, `unfinished` or `missing`."""

    title: str
    state: str
    figure: str = ""
    facts: list[str] = field(default_factory=list)
    time: str = ""


@dataclass(frozen=True)
class Lane:
    """The cards of one model, side by side."""

    name: str
    arm: str
    cards: list[Card]


def source(run: Run) -> list[Card]:
    """What all arms share: the data as found and their captions."""
    sets = list(run.captions.items())
    manifest = next((stage.manifest for _, stage in sets if stage.manifest), {})
    origin = manifest.get("input") or {}
    path = origin.get("path") or run.recipe.get("dataset") or ""
    facts = [fact for fact in (Path(path).name, origin.get("format")) if fact]
    rows = _number(manifest.get("rows_in"), "pair")
    return [
        Card("dataset", "done" if manifest or path else "missing", rows, facts),
        *(_caption(name, stage) for name, stage in sets),
    ]


def lanes(run: Run) -> list[Lane]:
    """From the captions to the score, per model."""
    return [
        Lane(walk.name, walk.arm, [*_data(run, walk.arm), _train(walk), _merge(walk), *_evaluate(run, walk)])
        for walk in run.walks
    ]


def comparison(run: Run) -> list[Card]:
    """Where the lanes meet: the result against the baseline, per arm."""
    cards = []
    for seed, found in run.seeds:
        for arm, difference in found["differences"].items():
            interval = " to ".join(numbers.points_text(end) for end in difference["interval"])
            facts = [
                f"{arm} {numbers.MINUS} {found['baseline']}" + ("" if seed is None else f", seed {seed}"),
                interval,
            ]
            cards.append(Card("compare", "done", f"{numbers.points_text(difference['difference'])} points", facts))
    return cards or [Card("compare", "missing")]


def own_training(run: Run) -> str:
    """What arms train in a way of their own, in words; empty where data is all that they differ in."""
    arms = (run.recipe.get("arms") or {}).items()
    return "; ".join(f"{arm} with {arm_own['train']}" for arm, arm_own in arms if (arm_own or {}).get("train"))


def models(run: Run) -> list[tuple[str, str, str]]:
    """What it is for, where it lies, its identity."""
    found = []
    for name, stage in run.captions.items():
        caption = stage.manifest.get("model") or {}
        own = (run.recipe.get("captions") or {}).get(name) or {}
        of_recipe = own.get("model") if isinstance(own, dict) else None
        path = caption.get("path") or of_recipe or (run.recipe.get("caption") or {}).get("model")
        if path and own != "found":
            what = f"Captions {name}".strip()
            found.append((f"{what} (BLIP-2)", str(path), str(caption.get("identity") or "")))
    identities = {str(walk.adapter.inputs.get("model") or "") for walk in run.walks} - {""}
    base = (run.recipe.get("train") or {}).get("model")
    if base or identities:
        found.append(("Base model of every arm (MGM)", str(base or ""), ", ".join(sorted(identities))))
    return found


def seeds(run: Run) -> list[tuple[str, str]]:
    """Everything that was drawn at random, and from which seed."""
    found = []
    trained = sorted({walk.adapter.manifest["seed"] for walk in run.walks if "seed" in walk.adapter.manifest})
    promised = run.recipe.get("seeds") or trained
    if promised:
        found.append(("training (order of the data, dropout, adapter)", ", ".join(map(str, promised))))
    for _, comparison in run.seeds[:1]:
        found.append((f"bootstrap ({comparison['resamples']:,} resamples)", _bootstrap_seed(run, comparison)))
    sample = run.recipe.get("sample") or {}
    if sample.get("out"):
        found.append(("sample world", str(sample.get("seed"))))
    return found


def versions(run: Run) -> tuple[dict[str, str], list[str]]:
    """Package -> version, over all stages; and the packages of which stages saw different ones."""
    seen: dict[str, set[str]] = {}
    for _, stage in run.stages():
        for package, version in (stage.manifest.get("versions") or {}).items():
            seen.setdefault(package, set()).add(version)
    return {package: " / ".join(sorted(found)) for package, found in seen.items()}, [
        p for p, f in seen.items() if len(f) > 1
    ]


def rows_of(manifest: dict[str, Any]) -> str:
    """`1,000 in, 874 out`, whatever the stage calls them."""
    rows_in = manifest.get("rows_in")
    if isinstance(rows_in, dict):  # training counts per phase
        return ", ".join(f"{phase}: {rows:,}" for phase, rows in rows_in.items())
    rows_out = manifest.get("rows_out", manifest.get("kept"))
    parts = [f"{rows_in:,} in" if rows_in is not None else "", f"{rows_out:,} out" if rows_out is not None else ""]
    return ", ".join(part for part in parts if part)


def _caption(name: str, stage: Stage) -> Card:
    manifest = stage.manifest
    failed = sum((manifest.get("failed") or {}).values())
    facts = [
        name,
        f"{failed:,} failed, each kept with its error" if failed else "",
        _number(manifest["duplicates"], "duplicate") if manifest.get("duplicates") else "",
        f"{manifest['images_per_second']:.1f} images/s" if manifest.get("images_per_second") else "",
    ]
    return _card("caption", stage, _number(manifest.get("captioned"), "caption"), facts)


def _data(run: Run, arm: str) -> list[Card]:
    return [_refine(run.datasets[arm])] if arm in run.datasets else []


def _refine(stage: Stage) -> Card:
    manifest = stage.manifest
    facts = []
    if manifest:
        text = {"caption": "captions as found", "recaption": "new captions"}[training_text(stage.directory)]
        if mix := stage.inputs.get("mix"):
            text = f"captions as found and new ones (mix: {mix['by']})"
        operators = len(stage.inputs.get("process") or [])
        facts = [
            f"of {manifest.get('samples', manifest['rows_in']):,} ({numbers.percent_text(manifest['retention'])})",
            f"trains on {text}",
            f"{operators} operators" if operators else "no filters",
        ]
    return _card("refine", stage, _number(manifest.get("kept"), "row") + " kept" if manifest else "", facts)


def _train(walk: Walk) -> Card:
    manifest = walk.adapter.manifest
    facts = [
        f"{phase}: {found['steps']:,} steps × {found['batch']}"
        if found.get("batch")
        else f"{phase}: {found['steps']:,} steps"
        for phase, found in (manifest.get("phases") or {}).items()
    ]
    strategy = (walk.adapter.inputs.get("config") or {}).get("strategy")
    if "same_as" in manifest:
        return _card("train", walk.adapter, "", [f"trained once, as {manifest['same_as']}: their data are equal"])
    if manifest:
        facts.append(f"seed {manifest.get('seed')}" + (f", {strategy}" if strategy else ""))
    log = read_log(walk.adapter.directory)
    figure = f"loss {numbers.figure_text(log[-1]['loss'])}" if log else ""
    return _card("train", walk.adapter, figure, facts, sum(manifest.get("training_seconds", {}).values()))


def _merge(walk: Walk) -> Card:
    manifest = walk.merged.manifest
    facts, figure = [], ""
    if manifest:
        figure = f"{manifest['merged_tensors']:,} tensors" if "merged_tensors" in manifest else "merged"
        figure = f"carries a {manifest['carried']}" if "carried" in manifest else figure
        if "max_logit_difference" in manifest:
            facts.append(f"logits agree within {manifest['max_logit_difference']:.1g}")
    return _card("merge", walk.merged, figure, facts)


def _evaluate(run: Run, walk: Walk) -> list[Card]:
    """One card per benchmark; one that is missing while there is none."""
    if not walk.evaluations:
        return [
            Card("evaluate", "missing", "", [title(str((run.recipe.get("evaluate") or {}).get("benchmark") or ""))])
        ]
    cards = []
    for name, stage in walk.evaluations.items():
        manifest = stage.manifest
        facts = [title(name)]
        if manifest:
            facts.append(f"{manifest['count']:,} questions")
            counts = (("errors", "failed"), ("truncated", "cut off at the token limit"))
            facts += [f"{manifest[key]:,} {what}" for key, what in counts if manifest.get(key)]
            facts += ["answers withheld: no score"] if manifest["accuracy"] is None else []
        figure = "" if manifest.get("accuracy") is None else numbers.percent_text(manifest["accuracy"])
        cards.append(_card("evaluate", stage, figure, facts))
    return cards


def _card(title: str, stage: Stage, figure: str, facts: list[str], seconds: float | None = None) -> Card:
    took = seconds if seconds is not None else stage.manifest.get("seconds")
    return Card(title, stage.state, figure, [fact for fact in facts if fact], numbers.clock(took))


def _number(value: int | None, what: str) -> str:
    return "" if value is None else f"{value:,} {what}" + ("" if value == 1 else "s")


def _bootstrap_seed(run: Run, comparison: dict[str, Any]) -> str:
    """With several training seeds, `seed` of a comparison is the training's; the recipe knows the bootstrap's."""
    configured = (run.recipe.get("compare") or {}).get("seed")
    return str(comparison["seed"] if configured is None else configured)
