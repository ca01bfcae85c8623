"""Comparisons: numbers against hand computation and scipy, and evaluations that must not be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pipelines.errors import UserError
from pipelines.evaluate.compare import compare, level, run, sentence, summarise, withheld
from pipelines.evaluate.config import CompareConfig
from pipelines.evaluate.stage import read_scores
from pipelines.evaluate.statistics import Pictures, bootstrap_means
from ray_jobs import cli

CONFIG = CompareConfig(resamples=4000, seed=3, examples=2)


def arm(scores: list[float], **changes: Any) -> dict[str, Any]:
    rows = [
        {
            "question_id": str(i),
            "image_id": f"i{i}",
            "question": "?",
            "prediction": "p",
            "answers": [],
            "score": s,
            "error": None,
        }
        for i, s in enumerate(scores)
    ]
    return {
        "benchmark": "textvqa",
        "accuracy": sum(scores) / len(scores),
        "count": len(scores),
        "errors": 0,
        "ocr_tokens": False,
        "max_new_tokens": 16,
        "annotations": {"identity": "x"},
        "questions": rows,
    } | changes


def test_differences_and_wins_by_hand() -> None:
    """Eight questions; 0.3 counts as wrong and 0.6 as right."""
    original = arm([0.0, 0.3, 1.0, 1.0, 0.0, 0.6, 0.0, 0.3])
    enhanced = arm([1.0, 1.0, 1.0, 0.3, 0.0, 0.6, 0.6, 0.6])
    result = compare({"original": original, "enhanced": enhanced}, CONFIG)
    found = result["differences"]["enhanced"]
    assert found["difference"] == pytest.approx((1 + 0.7 + 0 - 0.7 + 0 + 0 + 0.6 + 0.3) / 8)
    assert (found["won"], found["lost"], found["tied"]) == (["0", "1", "6", "7"], ["3"], ["2", "4", "5"])
    assert found["counts"] == {"won": 4, "lost": 1, "tied": 3}
    right = found["right"]
    assert (right["only_this_arm_correct"], right["only_baseline_correct"]) == (4, 1)
    assert (right["both_correct"], right["neither_correct"]) == (2, 1)
    assert found["p_value"] == found["p_value_together"] == 10 / 32  # of 32 choices of sign, those as far from 0
    assert [example["question_id"] for example in found["examples"]["won"]] == ["0", "1"]
    assert result["arms"]["original"]["accuracy"] == original["accuracy"]


def test_intervals_agree_with_scipy_and_pair_the_arms() -> None:
    random = np.random.default_rng(0)
    base = random.choice([0.0, 0.3, 0.6, 0.9, 1.0], size=400)
    better = np.clip(base + random.choice([0.0, 0.0, 0.3, -0.3], size=400), 0, 1)
    ours = compare({"original": arm(list(base)), "enhanced": arm(list(better))}, CONFIG)
    settings: dict[str, Any] = {"n_resamples": 4000, "method": "percentile", "rng": np.random.default_rng(1)}
    paired = stats.bootstrap((better - base,), np.mean, **settings).confidence_interval
    single = stats.bootstrap((base,), np.mean, **settings).confidence_interval
    assert ours["differences"]["enhanced"]["interval"] == pytest.approx([paired.low, paired.high], abs=0.004)
    assert ours["arms"]["original"]["interval"] == pytest.approx([single.low, single.high], abs=0.006)
    assert np.diff(ours["differences"]["enhanced"]["interval"]) < 0.6 * np.diff(ours["arms"]["original"]["interval"])


def test_resampling_is_seeded_and_does_not_need_memory_for_all_resamples() -> None:
    scores = np.random.default_rng(0).random((2, 5000))
    each = Pictures(np.arange(5000), 5000)
    means = bootstrap_means(scores, each, 1850, seed=1)
    assert means.shape == (2, 1850)
    assert np.array_equal(means, bootstrap_means(scores, each, 1850, seed=1))
    assert not np.array_equal(means, bootstrap_means(scores, each, 1850, seed=2))
    assert means.std(axis=1) == pytest.approx(scores.std(axis=1) / 5000**0.5, rel=0.15)


def test_no_difference_is_no_finding() -> None:
    same = arm([0.0, 1.0, 0.6])
    found = compare({"original": same, "enhanced": same}, CONFIG)["differences"]["enhanced"]
    assert found["difference"] == 0 and found["interval"] == [0, 0] and not found["excludes_zero"]
    assert found["p_value"] == 1.0 and found["equivalent"]


def verdict(base: list[float], other: list[float], **config: Any) -> bool:
    settings = CompareConfig(**{"resamples": 1000} | config)
    return compare({"original": arm(base), "enhanced": arm(other)}, settings)["differences"]["enhanced"][
        "excludes_zero"
    ]


def test_a_verdict_needs_interval_and_permutation_test() -> None:
    """The bootstrap of a few questions that all fall one way has no width; the other knows how few they are."""
    assert not verdict([0.0], [1.0])
    assert not verdict([0.0] * 5, [1.0] * 5)
    assert verdict([0.0] * 6, [1.0] * 6) and verdict([1.0] * 6, [0.0] * 6)
    assert not verdict([0.0] * 6, [1.0] * 6, confidence=0.99)
    soft = [0.3] * 40  # better throughout, and never right
    assert not verdict([0.0] * 40, soft)
    assert not verdict([0.6] * 10 + [0.0] * 40, [0.3] * 10 + [0.4] * 40), "score and right answers disagree"


def failing(scores: list[float], failed: int) -> dict[str, Any]:
    """An arm whose last `failed` requests failed."""
    found = arm(scores[: len(scores) - failed] + [0.0] * failed, errors=failed)
    for row in found["questions"][len(scores) - failed :]:
        row["error"] = "HTTP 500"
    return found


def test_failures_that_could_turn_the_sign_forbid_a_verdict() -> None:
    """One model, of which a third of the requests failed once: worth anything from 0 to 1 had they been answered."""
    right = [1.0] * 60
    found = compare({"original": failing(right, 20), "enhanced": arm(right)}, CONFIG)
    difference = found["differences"]["enhanced"]
    assert difference["interval"][0] > 0 and difference["p_value"] < 1e-3 and not difference["excludes_zero"]
    assert difference["failures"] == {"count": 20, "bounds": [0.0, pytest.approx(1 / 3)], "forbid_a_verdict": True}
    words = "no verdict, because 20 requests failed: answered, the difference could be +0.0 to +33.3"
    assert words in withheld(found)[0] and words in sentence(found, "enhanced")


def test_a_verdict_holds_in_the_worst_case_of_the_failures() -> None:
    better = compare({"original": failing([0.0] * 60, 6), "enhanced": failing([1.0] * 60, 6)}, CONFIG)
    difference = better["differences"]["enhanced"]
    assert difference["failures"]["bounds"] == pytest.approx([(54 - 6) / 60, 1.0])
    assert difference["excludes_zero"] and not withheld(better)
    # Six questions decide; one of them failed, and five are too few to tell.
    few = compare({"original": failing([0.0] * 6, 1), "enhanced": arm([1.0] * 6)}, CONFIG)
    difference = few["differences"]["enhanced"]
    assert difference["failures"]["bounds"] == pytest.approx([5 / 6, 1.0]) and withheld(few)
    assert not difference["excludes_zero"]


def test_confidence_is_never_rounded_to_certainty() -> None:
    assert [level(value) for value in (0.95, 0.9, 0.999, 0.9999, 0.975)] == ["95", "90", "99.9", "99.99", "97.5"]


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"questions": arm([1.0, 1.0])["questions"]}, "same questions"),
        ({"ocr_tokens": True}, "ocr_tokens is True and False"),
        ({"max_new_tokens": 99}, "max_new_tokens"),
        ({"annotations": {"identity": "y"}}, "different annotation files"),
        ({"prompts": "z"}, "in the same words"),
    ],
)
def test_what_must_not_be_compared(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    for name, scores in (("original", arm([1.0] * 3)), ("enhanced", arm([1.0] * 3, **changes))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text(json.dumps(scores))
    evaluations = {name: tmp_path / name for name in ("original", "enhanced")}
    with pytest.raises(UserError, match=match):
        run(evaluations, tmp_path, CONFIG)


@pytest.mark.parametrize(
    "damage, words",
    [
        ("[]", "not the scores of an evaluation"),
        (arm([1.0], questions=[]), "holds no questions"),
        (arm([0.5, float("nan")]), r"questions\[1\] has score nan"),
        (arm([1.0], questions=[{"question_id": "0", "score": 1.0}]), r"questions\[0\] lacks"),
    ],
)
def test_scores_that_are_none_are_named(tmp_path: Path, damage: Any, words: str) -> None:
    (tmp_path / "scores.json").write_text(damage if isinstance(damage, str) else json.dumps(damage))
    with pytest.raises(UserError, match=words):
        read_scores(tmp_path)


def test_run_writes_the_comparison_and_names_what_is_missing(tmp_path: Path) -> None:
    for name, value in (("original", 0.0), ("enhanced", 1.0), ("third", 0.3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scores.json").write_text(json.dumps(arm([value] * 5)))
    evaluations = {name: tmp_path / name for name in ("original", "enhanced", "third")}
    comparison = run(evaluations, tmp_path / "out", CONFIG)
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == comparison
    assert comparison["differences"]["enhanced"]["interval"] == [1.0, 1.0]
    assert set(comparison["differences"]) == {"enhanced", "third"}
    with pytest.raises(UserError, match="at least two"):
        run({"original": tmp_path / "original"}, tmp_path / "out", CONFIG)
    with pytest.raises(UserError, match=r"compare\.baseline"):
        run({"a": tmp_path / "third", "b": tmp_path / "enhanced"}, tmp_path / "out", CompareConfig(baseline="original"))
    with pytest.raises(UserError, match="no finished evaluation"):
        run({"original": tmp_path / "original", "enhanced": tmp_path / "out"}, tmp_path / "out", CONFIG)


def test_the_command_names_arms_and_refuses_a_mistyped_baseline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for place, found in (
        ("r/a/predictions/textvqa", arm([0.0] * 8)),
        ("lr=1", arm([1.0] * 8)),
        ("sick", failing([1.0] * 8, 1)),
    ):
        Path(place).mkdir(parents=True)
        Path(place, "scores.json").write_text(json.dumps(found))
    assert cli.main(["compare", "r/a/predictions/textvqa", "lr=1", "--output", "out", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["baseline"] == "a" and list(found["differences"]) == ["lr=1"]
    named = ["compare", "base=r/a/predictions/textvqa", "new=lr=1", "--output", "out"]
    assert cli.main([*named, "--compare.confidence", "0.999"]) == 0
    assert "new 100.0 %, base 0.0 %: difference +100.0 points, 99.9 % interval" in (said := capsys.readouterr().out)
    assert "does not exclude zero: 8 questions won and 0 lost are too few" in said
    for wrong, words in (
        (["--compare.baseline", "bsae"], "compare.baseline names 'bsae', but the arms are base, new"),
        (["base=lr=1"], "two evaluations are named 'base'"),
    ):
        assert cli.main([*named[:3], *wrong, *named[3:]]) == 2
        assert words in capsys.readouterr().err
    assert cli.main(["compare", "lr=1", "sick", "--output", "out"]) == 1
    assert "no verdict, because 1 request failed: answered, the difference could be" in capsys.readouterr().err


def test_questions_on_one_picture_are_one_observation() -> None:
    """Twenty questions won on four pictures are four observations: too few; on twenty pictures they are enough."""
    base, other = arm([0.0] * 20), arm([1.0] * 20)
    assert compare({"original": base, "enhanced": other}, CONFIG)["differences"]["enhanced"]["excludes_zero"]
    for found in (base, other):
        for index, row in enumerate(found["questions"]):
            row["image_id"] = f"i{index % 4}"
    comparison = compare({"original": base, "enhanced": other}, CONFIG)
    difference = comparison["differences"]["enhanced"]
    assert comparison["pictures"] == 4 and difference["p_value"] == 2 / 16 and not difference["excludes_zero"]
    assert "20 questions won and 0 lost are too few" in sentence(comparison, "enhanced")


def test_several_arms_are_judged_together() -> None:
    """Six questions won are p = 0.03: enough for one arm, too little where three try (Holm)."""
    arms = {"original": arm([0.0] * 40)} | {n: arm([1.0] * 6 + [0.0] * 34) for n in ("a", "b", "c")}
    found = compare(arms, CONFIG)
    assert all(
        entry["p_value"] == 2 / 64 and entry["p_value_together"] == 6 / 64 for entry in found["differences"].values()
    )
    assert not any(entry["excludes_zero"] for entry in found["differences"].values())
    assert "for all arms together" in sentence(found, "a")
    alone = compare({name: arms[name] for name in ("original", "a")}, CONFIG)["differences"]["a"]
    assert alone["excludes_zero"]


def test_an_open_result_says_what_it_could_have_seen() -> None:
    """Two thousand questions of which two changed are equal within a point; sixty that differ by chance are not."""
    random = np.random.default_rng(0)
    base = list(random.choice([0.0, 1.0], size=2000))
    close = compare({"original": arm(base), "enhanced": arm([1 - base[0], 1 - base[1], *base[2:]])}, CONFIG)
    assert close["differences"]["enhanced"]["equivalent"] and "equal within 1 point" in sentence(close, "enhanced")
    few = compare({"original": arm(base[:60]), "enhanced": arm(list(random.choice([0.0, 1.0], size=60)))}, CONFIG)
    least = few["differences"]["enhanced"]["detectable"]
    assert 0.15 < least < 0.35 and f"{100 * least:.1f} points would have been seen in 4 of 5" in sentence(
        few, "enhanced"
    )


def test_several_seeds_are_one_result(tmp_path: Path) -> None:
    """The mean over seeds with an interval over pictures and seeds, from the answers that the comparisons name."""

    def over(counts: list[int]) -> list[dict[str, Any]]:
        comparisons = []
        for seed, right in enumerate(counts):
            arms = {"original": arm([0.0] * 60), "enhanced": arm([1.0] * right + [0.0] * (60 - right))}
            for name, found in arms.items():
                (tmp_path / f"{seed}" / name).mkdir(parents=True, exist_ok=True)
                (tmp_path / f"{seed}" / name / "scores.json").write_text(json.dumps(found))
            named = {name: str(tmp_path / f"{seed}" / name) for name in arms}
            comparisons.append(compare(arms, CONFIG) | {"evaluations": named})
        return comparisons

    steady = summarise(over([18, 19, 20]), CONFIG)["differences"]["enhanced"]
    assert steady["each"] == pytest.approx([18 / 60, 19 / 60, 20 / 60]) and steady["mean"] == pytest.approx(19 / 60)
    assert steady["same_sign"] and steady["excludes_zero"] and steady["interval"][0] > 0.1
    wild = summarise(over([4, 30, 58]), CONFIG)["differences"]["enhanced"]
    assert wild["same_sign"] and not wild["excludes_zero"], "three seeds that disagree so much show nothing"
    assert wild["intervals_exclude_zero"] == 2 and np.diff(wild["interval"]) > 3 * np.diff(steady["interval"])
    with pytest.raises(UserError, match="at least two seeds"):
        summarise(over([4]), CONFIG)
