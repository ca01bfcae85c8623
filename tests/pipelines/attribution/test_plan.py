"""Which coalitions have to be trained: none twice, none for an operator that changes nothing, never too many."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipelines.attribution import explanation
from pipelines.attribution.causes import ArmData, Cause, Ledger, alone, find
from pipelines.attribution.plan import plan
from pipelines.attribution.shapley import Coalition
from pipelines.errors import UserError
from pipelines.evaluate.config import CompareConfig
from pipelines.evaluate.statistics import Pictures
from pipelines.refine.operators import Process

NAMES = ("captions", "loops", "words", "idle", "same")


def ledger(drops: dict[str, tuple[set[int], set[int]]], kinds: dict[str, str] | None = None) -> Ledger:
    """Twenty rows; what each operator drops of those with the captions as found, and of those with new ones."""
    causes = [Cause("captions", "captions")]
    causes += [Cause(name, (kinds or {}).get(name, "filter"), (at,)) for at, name in enumerate(drops)]
    rows: dict[Coalition, np.ndarray] = {}
    for each in alone(causes):
        new = 0 in each
        kept = set(range(20)) - {row for number in each - {0} for row in drops[causes[number].name][new]}
        rows[each] = np.array(sorted(row + 100 * new for row in kept), dtype=np.uint64)
    return Ledger(causes, rows)


def plain() -> Ledger:
    nothing: set[int] = set()
    loops = {1, 2, 3}
    return ledger(
        {"loops": (loops, nothing), "words": ({4}, {5}), "idle": (nothing, nothing), "same": (loops, nothing)}
    )


def test_an_operator_that_changes_no_row_is_not_asked_for() -> None:
    found = plain()
    assert [found.causes[number].name for number in found.live] == ["captions", "loops", "words", "same"]
    assert found.changed(1) == {"found": 3, "new": 0} and found.changed(0) == {"found": 20}
    assert all(3 not in each for each in plan(found, [], 32, 0).wanted)


def test_equal_data_are_trained_once_and_arms_of_the_run_not_again() -> None:
    """Two filters that drop the same rows, which among new captions there are none of: of 16 coalitions 6 are left."""
    found = plain()
    everything = frozenset({0, 1, 2, 3, 4})
    whole = plan(found, [], 32, 0)
    assert whole.game.exact and len(whole.game.coalitions) == 16 and len(whole.untrained) == 6
    rest = plan(found, [frozenset(), everything], 4, 0)
    assert rest.game.exact and len(rest.untrained) == 4
    assert found.data_of(frozenset({0, 1})) == found.data_of(frozenset({0})) != found.data_of(frozenset({0, 2}))
    with pytest.raises(UserError, match="explain.budget: 2 "):
        plan(found, [frozenset(), everything], 2, 0)


def test_a_small_budget_draws_orders_and_is_kept() -> None:
    drops = {f"filter{n}": ({n}, {n + 6}) for n in range(6)}
    found = plan(ledger(drops), [frozenset(), frozenset(range(7))], 40, 0)
    assert not found.game.exact and len(found.game.weights_GNC) >= 2
    assert 20 < len(found.untrained) <= 40
    with pytest.raises(UserError, match="two orders of them"):
        plan(ledger(drops), [], 14, 0)


def test_what_stands_behind_a_mapper_may_change_something() -> None:
    """Alone it saw other texts; and coalitions with a mapper are their own data."""
    nothing: set[int] = set()
    drops = {"mapper": ({1}, {1}), "idle": (nothing, nothing)}
    assert ledger(drops, {"mapper": "mapper"}).live == [0, 1, 2]
    assert ledger(dict(reversed(drops.items())), {"mapper": "mapper"}).live == [0, 2]
    found = ledger(drops, {"mapper": "mapper"})
    assert found.data_of(frozenset({1, 2})) != found.data_of(frozenset({1}))


def test_an_explanation_adds_up_and_says_what_each_cause_did() -> None:
    """Captions bring 30 points, `words` 10 and, with captions, 5 more; over two seeds that differ by two points."""
    found = ledger({"words": ({1}, {2}), "idle": (set(), set())})
    asked = plan(found, [], 8, 0)
    random = np.random.default_rng(0)
    luck_SQ = random.random((2, 200)) < np.array([[0.10], [0.12]])

    def score(each: Coalition) -> np.ndarray:
        gain = 0.3 * (0 in each) + 0.1 * (1 in each) + 0.05 * (each >= {0, 1})
        return luck_SQ + gain * np.linspace(0.5, 1.5, 200)

    scores = {each: score(each) for each in asked.wanted}
    measured = explanation.Measured(
        "original",
        "enhanced",
        "textvqa",
        False,
        [0, 1],
        scores,
        Pictures.named([str(n // 2) for n in range(200)]),
        {each: [] for each in asked.wanted},
        4,
    )
    got = explanation.explain(asked, measured, CompareConfig(resamples=400))
    causes = {entry["name"]: entry for entry in got["causes"]}
    assert causes["captions"]["part"] == pytest.approx(0.325) and causes["words"]["part"] == pytest.approx(0.125)
    assert (causes["idle"]["part"], causes["idle"]["interval"]) == (0.0, [0.0, 0.0])
    assert sum(entry["part"] for entry in got["causes"]) == pytest.approx(got["gain"]["value"], abs=1e-12)
    assert causes["words"]["left_out"]["value"] == pytest.approx(0.15)
    assert causes["words"]["alone"]["value"] == pytest.approx(0.10)
    assert got["two_by_two"]["interaction"] == pytest.approx(0.05)
    low, high = causes["captions"]["interval"]
    assert low < 0.325 < high < 0.5
    steps = got["waterfall"]
    assert [step["name"] for step in steps] == ["original", "captions", "words", "idle", "enhanced"]
    assert steps[-2]["to"] == pytest.approx(steps[-1]["to"])
    lines = explanation.table(got).splitlines()
    assert lines[2].split()[:2] == ["captions", "+32.5"] and lines[4].split() == ["idle", "0", "0", "%", "+0.0", "none"]


def test_mixing_needs_new_captions_and_makes_data_of_its_own() -> None:
    causes = [Cause("captions", "captions"), Cause("mixing", "mixing"), Cause("idle", "filter", (0,))]
    rows = {each: np.arange(5, dtype=np.uint64) + 100 * len(each - {2}) for each in alone(causes)}
    found = Ledger(causes, rows)
    assert found.live == [0, 1] and found.changed(1) == {"new": 5}
    assert found.data_of(frozenset({1, 2})) == found.data_of(frozenset())
    assert found.data_of(frozenset({0, 1})) != found.data_of(frozenset({0}))


def test_an_arm_that_makes_the_same_data_or_lacks_a_filter_is_refused() -> None:
    words: Process = [{"words_num_filter": {"min_num": 4}}]
    base = ArmData("a", ("", "caption"), None, [])
    with pytest.raises(UserError, match="arms.b: makes the same data as the baseline a"):
        find(base, replace(base, arm="b"))
    with pytest.raises(UserError, match="arms.b.recipe: lacks the operator words_num_filter"):
        find(replace(base, process=words), ArmData("b", ("", "recaption"), None, []))
    with pytest.raises(UserError, match="arms.a.mix: the baseline mixes"):
        find(replace(base, mix="random"), ArmData("b", ("", "recaption"), None, []))
    more = [*words, {"text_length_filter": {"min_len": 4}}]
    causes = find(replace(base, process=words), ArmData("b", ("", "recaption"), "random", more))
    assert [(cause.name, cause.kind, cause.positions) for cause in causes] == [
        ("captions", "captions", ()),
        ("mixing", "mixing", ()),
        ("text_length_filter", "filter", (1,)),
    ]
