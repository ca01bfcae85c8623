"""The run in short: the few numbers that such experiments are told by, an arm a column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from pipelines.records import read_shards
from pipelines.report import bill, numbers
from pipelines.report.data import ArmData
from pipelines.report.training import PhaseRow
from pipelines.rundir import Run
from pipelines.text import Texts

DIVERSITY = "lexical_diversity"


@dataclass(frozen=True)
class Line:
    """One quantity: of the captions as found, and of every arm; empty where there is none."""

    title: str
    found: Markup
    arms: list[Markup]
    note: str = ""


def lines(run: Run, refined: Sequence[ArmData], phases: Sequence[PhaseRow], arms: Sequence[str]) -> list[Line]:
    """What is known so far; of several seeds the first."""
    data = {found.arm: found for found in refined if found.metrics}
    first = {walk.arm: walk.name for walk in reversed(run.walks)}
    trained = {arm: [row for row in phases if row.walk == first.get(arm)] for arm in arms}
    every = [*_of_data(data, arms), *_of_training(trained, arms), *_of_scores(run, arms)]
    return [line for line in every if any(line.arms)]


def _of_data(data: dict[str, ArmData], arms: Sequence[str]) -> list[Line]:
    if not data:
        return []
    before = next(iter(data.values())).metrics["before"]

    def line(title: str, key: str, digits: int, note: str = "") -> Line:
        cells = [_changed(before[key], data[arm].metrics["after"][key], digits) if arm in data else "" for arm in arms]
        return Line(title, _figure(before[key], digits), [Markup(cell) for cell in cells], note)

    return [
        line("Lexical diversity", DIVERSITY, 3, "unique words / words"),
        _at_equal_rows(data, arms),
        line("Mean words", "mean_words", 4),
        line("Character repetition", "char_rep_ratio", 2),
        line("Word repetition", "word_rep_ratio", 2),
        Line(
            "Kept share",
            Markup(""),
            [numbers.percent(data[arm].metrics["retention"]) if arm in data else Markup("") for arm in arms],
        ),
    ]


def _at_equal_rows(data: dict[str, ArmData], arms: Sequence[str]) -> Line:
    """The captions as found of the rows that an arm keeps, and what it trains on: fewer rows alone raise diversity."""
    cells = []
    for arm in arms:
        cell = Markup("")
        if arm in data and data[arm].text:
            column = data[arm].text
            table = read_shards(data[arm].stage.directory, columns=["sample_id", *{"caption", column}])
            before, after = (_diversity(table[name].to_pylist()) for name in ("caption", column))
            cell = Markup("{} → {}").format(_figure(before, 3), _changed(before, after, 3))
        cells.append(cell)
    return Line("at equal rows", Markup(""), cells, "captions as found of the kept rows → what the arm trains on")


def _diversity(texts: list[str | None]) -> float:
    found = Texts()
    found.add([text or "" for text in texts])
    return float(found.metrics()[DIVERSITY])


def _of_training(trained: dict[str, list[PhaseRow]], arms: Sequence[str]) -> list[Line]:
    names = list(dict.fromkeys(row.phase for rows in trained.values() for row in rows))
    found = []
    for phase in names:
        rows = {arm: next((row for row in trained[arm] if row.phase == phase), None) for arm in arms}

        def line(title: str, tell: Callable[[PhaseRow], Markup], rows: Any = rows, phase: str = phase) -> Line:
            return Line(title, Markup(""), [tell(row) if row else Markup("") for row in rows.values()], phase)

        found += [
            line("Loss, range", lambda row: _two(row.went.loss, "to")),
            line("Loss, spread", lambda row: numbers.figure(row.went.spread, 2)),
            line("Gradient norm, first → last", lambda row: _two(row.went.grad_norm, "→")),
            line("Trainable share", lambda row: numbers.percent(row.facts.get("trainable_share"))),
            line("Peak memory, GiB", lambda row: numbers.figure(row.peak)),
        ]
    return found


def _of_scores(run: Run, arms: Sequence[str]) -> list[Line]:
    if not run.seeds:
        return []
    seed, comparison = run.seeds[0]
    scored = comparison["arms"]
    gains = {gain.arm: gain for gain in reversed(bill.gains(run)) if gain.rate is not None}
    score = [numbers.percent(scored[arm]["accuracy"]) if arm in scored else Markup("") for arm in arms]
    found = [Line("Score", Markup(""), score, "" if seed is None else f"seed {seed}")]
    for unit in dict.fromkeys(gain.unit for gain in gains.values()):
        rates = {arm: gain.rate for arm, gain in gains.items() if gain.unit == unit and gain.rate is not None}
        cells = [numbers.figure(100 * rates[arm], 3) if arm in rates else Markup("") for arm in arms]
        found.append(Line(f"Points per {unit}", Markup(""), cells, f"over {comparison['baseline']}"))
    return found


def _two(ends: Sequence[float], between: str) -> Markup:
    return Markup("{} {} {}").format(_figure(ends[0], 3), between, _figure(ends[1], 3))


def _figure(value: float | None, digits: int) -> Markup:
    return Markup("") if value is None else numbers.figure(value, digits)


def _changed(before: float | None, after: float | None, digits: int) -> Markup:
    """A value and its change in per cent."""
    if after is None:
        return Markup("")
    per_cent = round(100 * (after / before - 1)) if before else None
    change = "" if per_cent is None else f"{per_cent:+d} %".replace("-", numbers.MINUS) if per_cent else "0 %"
    return Markup("{} <small>{}</small>").format(numbers.figure(after, digits), change)
