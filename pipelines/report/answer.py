"""Did better data make a better model? The answer in words, and what the drawing of it shows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from pipelines.evaluate.compare import clean_sentence, level
from pipelines.evaluate.registry import asked, title
from pipelines.report import charts, numbers
from pipelines.rundir import Run


@dataclass(frozen=True)
class Answer:
    """One arm against the baseline. `mood` is `good`, `bad` or `open`; `brief` says it in a line; `control` is an arm
    without captions.
    """

    arm: str
    mood: str
    word: str
    sentence: Markup
    brief: Markup = Markup("")
    control: bool = False


def answers(run: Run) -> list[Answer]:
    """One per arm that is compared with the baseline, the largest gain first and the control last; none while the
    comparison is missing.
    """
    if not run.seeds:
        return []
    _, first = run.seeds[0]
    several = len(run.seeds) > 1
    without = controls(run)
    gains = run.comparison["summary"]["differences"] if several else first["differences"]
    order = sorted(gains, key=lambda arm: (arm in without, -gains[arm]["mean" if several else "difference"]))
    found = [_over_seeds(run, arm) if several else _single(first, arm) for arm in order]
    return [_briefly(each, run, each.arm in without) for each in found]


def controls(run: Run) -> list[str]:
    """Arms that train on no captions at all."""
    arms = (run.recipe.get("arms") or {}).items()
    return [arm for arm, own in arms if (own or {}).get("align") == "none"]


def _briefly(answer: Answer, run: Run, control: bool) -> Answer:
    """The same in a line, for arms beside the first. A control is no better data: it says what the baseline's captions
    are worth.
    """
    _, first = run.seeds[0]
    baseline = first["baseline"]
    summary = (run.comparison.get("summary") or {}).get("differences", {}).get(answer.arm)
    found = summary or first["differences"][answer.arm]
    text = Markup("{score}: <b>{difference} points</b> against {baseline} ({low} to {high}).").format(
        score=numbers.percent(_mean_score(run.comparison, answer.arm)),
        difference=numbers.points(found["mean" if summary else "difference"]),
        baseline=baseline,
        low=numbers.points(found["interval"][0]),
        high=numbers.points(found["interval"][1]),
    )
    if not control:
        return replace(answer, brief=text)
    text += f" It trains on no captions: as good as {baseline}, those captions taught nothing; better, they did harm."
    return replace(answer, word="The control.", brief=text, control=True)


def _single(comparison: dict[str, Any], arm: str) -> Answer:
    found, baseline = comparison["differences"][arm], comparison["baseline"]
    low, high = found["interval"]
    if withheld(found):
        mood, word = "open", "Withheld."
    elif found["excludes_zero"]:
        mood, word = ("good", "Yes.") if found["difference"] > 0 else ("bad", "No, a worse one.")
    else:
        mood, word = "open", "Not shown."
    sentence = Markup(
        "Trained on the <b>{arm}</b> data the model scores <b>{score}</b> on {count} {asked}, "
        "trained on the "
        "<b>{baseline}</b> data {base}: a difference of <b>{difference} points</b> ({confidence} interval "
        "{low} to {high}; it covers other questions on other pictures, not another training seed)."
    ).format(
        arm=arm,
        score=numbers.percent(comparison["arms"][arm]["accuracy"]),
        count=numbers.count(comparison["count"]),
        asked=asked(comparison),
        baseline=baseline,
        base=numbers.percent(comparison["arms"][baseline]["accuracy"]),
        difference=numbers.points(found["difference"]),
        confidence=confidence(comparison),
        low=numbers.points(low),
        high=numbers.points(high),
    )
    clean = clean_sentence(comparison, arm)
    sentence += (_why_open(found) if mood == "open" else "") + (f" {clean[0].upper()}{clean[1:]}." if clean else "")
    return Answer(arm, mood, word, sentence)


def _why_open(found: dict[str, Any]) -> Markup:
    """What stands between the difference and a verdict."""
    if withheld(found):
        least, largest = found["failures"]["bounds"]
        return Markup(
            " {number} requests failed and count as wrong answers; answered, they could have made it anything from "
            "{least} to {largest}, and too little to be told from chance. Evaluating again asks them again."
        ).format(
            number=numbers.count(found["failures"]["count"]),
            least=numbers.points(least),
            largest=numbers.points(largest),
        )
    if found["interval"][0] <= 0 <= found["interval"][1]:
        return Markup(" The interval holds zero: this run cannot tell the two apart.") + _could_see(found)
    return Markup(
        " The interval excludes zero, but too few questions changed for the permutation test to agree ({p})."
    ).format(p=numbers.p_value(found["p_value_together"]))


def _could_see(found: dict[str, Any]) -> Markup:
    """What an open result still says: as good as equal, or how large a difference would not have been missed."""
    if found["equivalent"]:
        return Markup(" It is narrow enough to call them equal.")
    if found["detectable"] is None:
        return Markup("")
    return Markup(" A difference of {least} points would have been seen in 4 of 5 such runs.").format(
        least=numbers.points_text(found["detectable"])
    )


def withheld(found: dict[str, Any]) -> bool:
    """Whether failed requests forbid a verdict on an arm's difference."""
    return bool((found.get("failures") or {}).get("forbid_a_verdict"))


def _over_seeds(run: Run, arm: str) -> Answer:
    _, first = run.seeds[0]
    summary = run.comparison["summary"]["differences"][arm]
    mean, number = summary["mean"], len(run.seeds)
    if summary["withheld"]:
        mood, word = "open", "Withheld."
    elif summary["excludes_zero"]:
        mood, word = ("good", "Yes.") if mean > 0 else ("bad", "No, a worse one.")
    else:
        mood, word = "open", "Not shown."
    agreement = "with the same sign every time" if summary["same_sign"] else "but not with the same sign every time"
    sentence = Markup(
        "Over {number} training seeds the <b>{arm}</b> data move the score on {count} {asked} by "
        "<b>{mean} points</b> on average against the <b>{baseline}</b> data ({each}), {agreement}. With other pictures "
        "and other seeds it would lie between {low} and {high} ({confidence} interval)."
    ).format(
        number=number,
        arm=arm,
        count=numbers.count(first["count"]),
        asked=asked(first),
        mean=numbers.points(mean),
        baseline=first["baseline"],
        each=Markup(", ").join(numbers.points(value) for value in summary["each"]),
        agreement=agreement,
        low=numbers.points(summary["interval"][0]),
        high=numbers.points(summary["interval"][1]),
        confidence=confidence(first),
    )
    if word == "Not shown.":
        sentence += _could_see(summary)
    if word == "Withheld.":
        sentence += " With at least one seed, failed requests hide too much; evaluating again asks them again."
    return Answer(arm, mood, word, sentence)


def plots(run: Run, styles: dict[str, int]) -> dict[str, Markup]:
    """`scores` and `differences` with their intervals; empty without a comparison."""
    if not run.seeds:
        return {}
    scores, differences = [], []
    for seed, comparison in run.seeds:
        suffix = "" if seed is None else f", seed {seed}"
        for arm, found in comparison["arms"].items():
            scores.append(_estimate(arm + suffix, found, "accuracy", numbers.percent_text, styles[arm]))
        for arm, found in comparison["differences"].items():
            name = f"{arm} {numbers.MINUS} {comparison['baseline']}{suffix}"
            differences.append(_estimate(name, found, "difference", numbers.points_text, styles[arm]))
    unit = f"{confidence(run.seeds[0][1])} intervals"
    label = f"Score of each arm in percent, {unit}"
    drawn = {"scores": charts.intervals(scores, label, lambda value: f"{value:g}")}
    if differences:
        label = f"Difference to the baseline in points, {unit}"
        drawn["differences"] = charts.intervals(differences, label, _signed, zero="no difference")
    return drawn


def benchmark(found: dict[str, Any]) -> str:
    """The benchmark's name as its authors write it; of drawn questions, whose they are not."""
    name = title(str(found.get("benchmark")))
    return f"drawn questions ({name}\N{RIGHT SINGLE QUOTATION MARK}s layout)" if found.get("drawn") else name


@dataclass(frozen=True)
class Further:
    """One arm against the baseline on a further benchmark, over all seeds where there are several."""

    benchmark: str
    count: int
    arm: str
    baseline: str
    scores: tuple[float, float]
    difference: float
    interval: list[float]
    word: str


def further(run: Run) -> list[Further]:
    """The benchmarks that do not give the verdict; each holds for itself."""
    rows = []
    for found in (run.comparison.get("also") or {}).values():
        summary = (found.get("summary") or {}).get("differences") or {}
        for arm, single in found["differences"].items():
            of = summary.get(arm, single)
            hidden = bool(of.get("withheld")) if arm in summary else withheld(single)
            word = "withheld" if hidden else "yes" if of["excludes_zero"] else "no"
            scores = (_mean_score(found, arm), _mean_score(found, found["baseline"]))
            value = of["mean"] if arm in summary else of["difference"]
            rows.append(
                Further(benchmark(found), found["count"], arm, found["baseline"], scores, value, of["interval"], word)
            )
    return rows


def _mean_score(found: dict[str, Any], arm: str) -> float:
    each = [seed["arms"][arm]["accuracy"] for seed in found.get("seeds") or [found]]
    return float(sum(each) / len(each))


def confidence(comparison: dict[str, Any]) -> str:
    """`95 %`."""
    return f"{level(comparison['confidence'])}\N{NARROW NO-BREAK SPACE}%"


def _signed(value: float) -> str:
    return f"{value:+g}".replace("-", numbers.MINUS) if value else "0"


def _estimate(name: str, found: dict[str, Any], key: str, text: Any, index: int) -> charts.Estimate:
    low, high = found["interval"]
    words = f"{text(found[key])}  ({text(low)} to {text(high)})"
    return charts.Estimate(name, 100 * low, 100 * found[key], 100 * high, words, index)
