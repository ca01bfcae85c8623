"""`captune report`: one page that says whether better data made a better model, and shows why one may believe it.

The page loads nothing: no scripts, no fonts, images inside it as data URLs, and a content security policy that forbids
the rest. Everything that came from data is escaped. What a half-done run lacks is said in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.evaluate.benchmark import picture_path
from pipelines.evaluate.registry import open_benchmark
from pipelines.files import write_text
from pipelines.report import answer, bill, causes, charts, data, examples, overview, short, templates, training
from pipelines.rundir import Run, RunDir, collect
from pipelines.train.stability import RULE

QUESTIONS = 12
"""Questions won, and as many lost, that are open to see; the other examples of the comparison unfold."""


def run(run_dir: Path | str) -> Path:
    """Write `run_dir/report/index.html` from what lies in the run directory and return its path.

    Raises:
        UserError: no such directory, nothing of a run in it, or a file of it is damaged (the file is named).
    """
    found = collect(run_dir)
    path = RunDir(Path(run_dir)).report
    write_text(path, render(found))
    return path


def render(run: Run) -> str:
    """The page as text; the same run gives the same page."""
    return templates.render("page.html.j2", view(run))


def view(run: Run) -> dict[str, Any]:
    """Everything the template shows."""
    styles = _styles(run)
    thumbnails = examples.Thumbnails()
    refined = data.arms(run, styles)
    phases = training.table(run, styles)
    versions, differing = overview.versions(run)
    return {
        "run": run,
        "styles": {arm: charts.style(index) for arm, index in styles.items()},
        "legend": [(arm, charts.swatch(index)) for arm, index in styles.items()],
        "answers": answer.answers(run),
        "plots": answer.plots(run, styles),
        "further": answer.further(run),
        "explained": causes.explained(run, styles),
        "short": short.lines(run, refined, phases, list(styles)),
        "benchmark": answer.benchmark(run.seeds[0][1]) if run.seeds else "",
        "withheld": answer.withheld,
        "confidence": answer.confidence(run.seeds[0][1]) if run.seeds else "",
        "source": overview.source(run),
        "lanes": overview.lanes(run),
        "own_training": overview.own_training(run),
        "compared": overview.comparison(run),
        "models": overview.models(run),
        "seeds": overview.seeds(run),
        "refined": refined,
        "metrics": data.metric_rows(refined, styles),
        "times": data.times,
        "galleries": _galleries(refined, thumbnails),
        "curves": training.curves(run, styles),
        "phases": phases,
        "stability": RULE,
        "scores": _scores(run),
        "kinds": _kinds(run),
        "questions": _questions(run, thumbnails),
        "stages": [(place, stage, overview.rows_of(stage.manifest)) for place, stage in run.stages()],
        "bill": bill.lines(run),
        "gains": bill.gains(run),
        "versions": versions,
        "differing": differing,
    }


def _styles(run: Run) -> dict[str, int]:
    """Arm -> number of its colour, dash and sign; the baseline has 0 whatever else is there."""
    named = [run.baseline, *run.arms, *(arm for _, found in run.seeds for arm in found["arms"])]
    known = set(named[1:])
    return {arm: number for number, arm in enumerate(dict.fromkeys(arm for arm in named if arm in known))}


def _galleries(refined: list[data.ArmData], thumbnails: examples.Thumbnails) -> list[dict[str, Any]]:
    """Arms with new captions first, since before and after is what there is to see; kept samples of one arm with old
    ones at most.
    """
    ordered = sorted(refined, key=lambda found: found.text != "recaption")
    galleries = []
    for place, found in enumerate(ordered):
        gallery: dict[str, Any] = {"arm": found.arm, "style": found.style, "metrics": found.metrics, "kept": []}
        if found.metrics:
            dataset = found.stage.directory
            if found.text == "recaption" or place == 0:
                gallery["kept"] = examples.kept_samples(dataset, thumbnails, found.text)
            gallery["rejected"], gallery["listed"], gallery["rejects"] = examples.rejected_samples(dataset, thumbnails)
        galleries.append(gallery)
    return galleries


def _scores(run: Run) -> list[dict[str, Any]]:
    """One row per model and benchmark: from the comparison, with an interval, or from an evaluation that stands
    alone.
    """
    rows = [
        {
            "name": arm if seed is None else f"{arm}, seed {seed}",
            "arm": arm,
            "of": found["benchmark"],
            "benchmark": answer.benchmark(found),
            **facts,
        }
        for seed, found in _comparisons(run)
        for arm, facts in found["arms"].items()
    ]
    compared = {(row["name"], row["of"]) for row in rows}
    for walk in run.walks:
        for name, stage in walk.evaluations.items():
            benchmark, facts = answer.benchmark({"benchmark": name} | stage.manifest), stage.manifest
            if facts and (walk.name, name) not in compared:
                rows.append({**facts, "name": walk.name, "arm": walk.arm, "benchmark": benchmark, "interval": None})
    return [{"truncated": None, "model": None, **row, "who": _who(row)} for row in rows]


def _comparisons(run: Run) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Of every seed, and then those of the further benchmarks."""
    yield from run.seeds
    for found in (run.comparison.get("also") or {}).values():
        yield from ((each["seed"], each) for each in found["seeds"]) if "seeds" in found else [(None, found)]


def _kinds(run: Run) -> list[tuple[str, dict[str, Any]]]:
    """Benchmark and comparison (first seed) of those that know several kinds of questions."""
    first: dict[str, dict[str, Any]] = {}
    for _, found in _comparisons(run):
        first.setdefault(found["benchmark"], found)
    told = [found for found in first.values() if any(each.get("kinds") for each in found["differences"].values())]
    return [(answer.benchmark(found), found) for found in told]


def _who(row: dict[str, Any]) -> str:
    """A model behind an endpoint as that calls it; a model of the run is known by the row's name."""
    said = row.get("answered_by") or {}
    return f"{said['name']} at {said['endpoint']}" if said.get("endpoint") else ""


def _questions(run: Run, thumbnails: examples.Thumbnails) -> list[dict[str, Any]]:
    """Per arm against the baseline (first seed): questions won and lost, as cards."""
    if not run.seeds:
        return []
    seed, comparison = run.seeds[0]
    groups = []
    for arm, found in comparison["differences"].items():
        for kind in ("won", "lost"):
            cards = []
            for example in found["examples"][kind]:
                said, agreeing = examples.most_common_answer(example["answers"])
                picture = _picture(comparison, example["image_id"], thumbnails)
                cards.append({**example, "said": said, "agreeing": agreeing, "picture": picture})
            groups.append(
                {
                    "arm": arm,
                    "baseline": comparison["baseline"],
                    "seed": seed,
                    "kind": kind,
                    "number": found["counts"][kind],
                    "cards": cards[:QUESTIONS],
                    "more": cards[QUESTIONS:],
                    "correct_from": comparison["correct_from"],
                }
            )
    return groups


def _picture(comparison: dict[str, Any], image_id: str, thumbnails: examples.Thumbnails) -> examples.Picture:
    try:
        benchmark = open_benchmark(comparison["benchmark"])
        return thumbnails.of_file(str(picture_path(benchmark, comparison.get("images") or "", image_id)))
    except UserError as error:
        return examples.Picture(problem=str(error))
