from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.records import read_shards
from pipelines.report import examples, page
from pipelines.train.log import read_log
from pipelines.train.stability import measure

from .synthetic_run import ONERROR, SCRIPT, build

_VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """The page as a browser sees it: its elements, and the text inside each class."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.by_class: dict[str, list[str]] = {}
        self._open: list[tuple[str, str, list[str]]] = []
        self.feed(html)
        assert not self._open, f"never closed: {[name for name, _, _ in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {key: value or "" for key, value in attrs}
        self.elements.append((tag, attributes))
        if tag not in _VOID:
            self._open.append((tag, attributes.get("class", ""), []))

    def handle_endtag(self, tag: str) -> None:
        name, classes, text = self._open.pop()
        assert name == tag
        for one in classes.split():
            self.by_class.setdefault(one, []).append(" ".join("".join(text).split()))

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        for _, _, text in self._open:
            text.append(data)

    def values(self) -> list[float]:
        """What the page's numbers are, before rounding."""
        return [float(attributes["value"]) for tag, attributes in self.elements if tag == "data"]

    def says(self, words: str) -> bool:
        return words in " ".join("".join(self.text).split())


@pytest.fixture(scope="session")
def shown(html: str) -> Page:
    return Page(html)


def test_the_page_loads_nothing_and_forbids_it(html: str, shown: Page) -> None:
    """One file to send around: no scripts, no fonts, no styles, no images from elsewhere, links only inside itself."""
    tags = {tag for tag, _ in shown.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "video", "audio", "image", "use"}
    for tag, attributes in shown.elements:
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,"), tag
        assert attributes.get("href", "#").startswith("#"), tag
        assert not {"srcset", "action", "xlink:href", "style", "background"} & set(attributes), tag
    style = html[html.index("<style>") : html.index("</style>")]
    assert "@import" not in style and set(re.findall(r"url\(([^)]*)\)", style)) == {"#hatch"}
    assert "default-src 'none'" in html
    assert len(html) < 6_000_000


def test_what_came_from_data_is_text_and_never_markup(html: str, shown: Page) -> None:
    """Captions, questions and answers of this run hold <script> and event handlers; all of it is shown and none of it
    is run.
    """
    assert not any(key.startswith("on") for _, attributes in shown.elements for key in attributes)
    assert SCRIPT not in html and ONERROR not in html
    assert shown.says(SCRIPT) and shown.says(ONERROR)


def test_the_numbers_are_those_of_the_comparison(finished: Path, shown: Page) -> None:
    comparison = json.loads((finished / "comparison.json").read_text())
    found = comparison["differences"]["enhanced"]
    expected = [found["difference"], *found["interval"], found["p_value_together"], found["counts"]["won"]]
    for arm in comparison["arms"].values():
        expected += [arm["accuracy"], *arm["interval"]]
    assert set(expected) <= set(shown.values())
    (lead,) = shown.by_class["lead"]
    for share in (found["difference"], *found["interval"], *(arm["accuracy"] for arm in comparison["arms"].values())):
        assert f"{100 * share:.1f}".lstrip("-") in lead
    assert shown.by_class["good"] == ["Yes."]
    drawn = " ".join(attributes.get("aria-label", "") for _, attributes in shown.elements)
    assert "Score of each arm" in drawn and "Difference to the baseline" in drawn


def test_every_reject_is_listed_with_its_reason(finished: Path, shown: Page) -> None:
    reasons = Counter[str]()
    for arm in ("original", "enhanced"):
        reasons.update(read_shards(finished / arm / "dataset" / "rejects")["reject_reason"].to_pylist())
    assert sum(reasons.values()) > 5
    assert Counter(shown.by_class["why"]) == reasons
    kinds = {reason.split(":")[0] for reason in reasons}
    assert len(shown.by_class["reason"]) == len(shown.by_class["out"])
    assert {words.removeprefix("rejected ").split(":")[0] for words in shown.by_class["reason"]} == kinds


def test_a_broken_file_is_a_placeholder_that_says_why(shown: Page) -> None:
    problems = shown.by_class["nopicture"]
    assert any("missing file" in words for words in problems) and any("broken image" in words for words in problems)
    pictures = [attributes for tag, attributes in shown.elements if tag == "img"]
    assert len(pictures) > 1 and all(attributes["alt"] for attributes in pictures)


def test_caption_metrics_and_funnel_are_those_of_the_refined_data(finished: Path, shown: Page) -> None:
    values = set(shown.values())
    for arm in ("original", "enhanced"):
        metrics = json.loads((finished / arm / "dataset" / "metrics.json").read_text())
        for key in ("lexical_diversity", "mean_words", "char_rep_ratio", "word_rep_ratio", "unique_texts"):
            assert {metrics["before"][key], metrics["after"][key]} <= values
        for step in metrics["funnel"]:
            assert shown.says(step["step"]) and shown.says(f"{step['rows_out']:,}")
        assert {metrics["rows_in"], metrics["kept"], metrics["retention"]} <= values


def test_training_is_told_with_its_numbers_and_a_verdict(finished: Path, tmp_path: Path) -> None:
    """Each phase of each arm; and the arms' losses stand on one axis under a warning where their texts differ."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    log = run / "original" / "adapter" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[55]["loss"] = 40.0
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = Page(page.run(run).read_text(encoding="utf-8"))
    assert shown.by_class["steady"] == ["yes"] * 3
    assert shown.by_class["unsteady"] == ["nothe loss spikes in step 56"]
    values = set(shown.values())
    for arm in ("original", "enhanced"):
        logged = read_log(run / arm / "adapter")
        for phase in ("align", "instruct"):
            found = measure([line for line in logged if line["phase"] == phase])
            assert found.held_out is not None
            assert {*found.loss, found.spread, *found.grad_norm, found.clipped, found.held_out[-1]} <= values
    assert {0.0082, 21_400.0, 0.41} <= values  # of the manifest: what learns, tokens a second, MFU
    assert shown.by_class["warning"][0].startswith("In align the arms learn different texts")
    label = "Held-out loss over training steps of original, enhanced"
    assert label in [attributes.get("aria-label") for _, attributes in shown.elements]


def test_the_same_run_gives_the_same_page(finished: Path, html: str) -> None:
    assert page.run(finished).read_text(encoding="utf-8") == html


def _no_comparison(run: Path) -> None:
    (run / "comparison.json").unlink()


def _captioning(run: Path) -> None:
    """Killed in the first stage."""
    for name in ("original", "enhanced"):
        shutil.rmtree(run / name)
    _no_comparison(run)
    (run / "captions" / "MANIFEST.json").unlink()


def _refining(run: Path) -> None:
    """Killed while the second arm was refined: shards without metrics, nothing trained."""
    _no_comparison(run)
    for name in ("adapter", "merged", "predictions"):
        shutil.rmtree(run / "original" / name)
        shutil.rmtree(run / "enhanced" / name)
    for name in ("MANIFEST.json", "metrics.json"):
        (run / "enhanced" / "dataset" / name).unlink()


def _training(run: Path) -> None:
    """Killed while the second arm trained: the log ends within a line."""
    _no_comparison(run)
    for name in ("merged", "predictions"):
        shutil.rmtree(run / "enhanced" / name)
    adapter = run / "enhanced" / "adapter"
    (adapter / "MANIFEST.json").unlink()
    lines = (adapter / "log.jsonl").read_text()
    (adapter / "log.jsonl").write_text(lines[: len(lines) // 3])


def _one_arm(run: Path) -> None:
    _no_comparison(run)
    shutil.rmtree(run / "enhanced")
    (run / "recipe.yaml").unlink()


def _only_comparison(run: Path) -> None:
    """As `captune compare` leaves it."""
    for path in (run / "captions", run / "original", run / "enhanced"):
        shutil.rmtree(path)
    (run / "recipe.yaml").unlink()


@pytest.mark.parametrize(
    ("damage", "note"),
    [
        (_no_comparison, "The comparison is made when every arm has been evaluated."),
        (_captioning, "No training step has been logged yet."),
        (_refining, "Refining has not finished."),
        (_training, "unfinished"),
        (_one_arm, "this run has a single arm"),
        (_only_comparison, "No arm has data yet."),
    ],
)
def test_a_half_done_run_says_what_is_missing(
    finished: Path, tmp_path: Path, damage: Callable[[Path], None], note: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    damage(run)
    half = Page(page.run(run).read_text(encoding="utf-8"))
    assert half.says(note)
    assert half.says("No answer yet.") != (run / "comparison.json").exists()


def test_several_seeds_have_a_row_each_and_one_answer(tmp_path: Path) -> None:
    run = build(tmp_path, rows=10, questions=60, seeds=(3, 4))
    shown = Page(page.run(run).read_text(encoding="utf-8"))
    comparison = json.loads((run / "comparison.json").read_text())
    for entry in comparison["seeds"]:
        assert entry["differences"]["enhanced"]["difference"] in shown.values()
        assert shown.says(f"enhanced, seed {entry['seed']}")
    assert comparison["summary"]["differences"]["enhanced"]["mean"] in shown.values()
    assert shown.says("the sign the same with every seed")


def test_a_step_without_a_finite_value_spoils_its_curve_no_further(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    log = run / "enhanced" / "adapter" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[10]["loss"] = float("nan")
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = Page(page.run(run).read_text(encoding="utf-8"))
    assert shown.says("nan")
    curves = [attributes["d"] for tag, attributes in shown.elements if tag == "path"]
    assert len(curves) > 1 and not any("nan" in curve for curve in curves)


def test_a_full_page_leaves_pictures_out_and_says_so(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examples, "_BUDGET", 30_000)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    small = page.run(run).read_text(encoding="utf-8")
    assert "left out to keep this page small" in small and len(small) < 400_000


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_what_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        page.run(tmp_path / name)
    assert not (tmp_path / name / "report").exists()


def test_the_bill_says_what_points_cost(finished: Path, tmp_path: Path) -> None:
    """Hours of every stage by group with their sum; points for the hours of an arm's own way; no rate where a stage on
    it does not say what it used.
    """
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    card = {"node_hours": 0.5, "cpu_hours": 2.0, "gpu_hours": 0.5, "cpu_hours_worked": 1.0, "gpu_hours_worked": 0.125}
    small = {"node_hours": 2.0, "cpu_hours": 4.0, "gpu_hours": 0.0, "cpu_hours_worked": 3.0, "gpu_hours_worked": 0.0}
    for path in run.rglob("MANIFEST.json"):
        manifest = json.loads(path.read_text())
        manifest["cost"] = {"cpu": small} | ({"train": card} if manifest["stage"] == "train" else {})
        path.write_text(json.dumps(manifest))
    text = page.run(run).read_text()
    found = Page(text)
    stages = len(list(run.rglob("MANIFEST.json")))
    assert {2.0 * stages, 1.0, 0.25, 0.75} <= set(found.values()), "node-hours, GPU-hours of two arms, shares"
    difference = json.loads((run / "comparison.json").read_text())["differences"]["enhanced"]["difference"]
    assert 100 * difference / 0.5 in found.values() and found.says("points per GPU-hour")
    merged = run / "enhanced" / "merged" / "MANIFEST.json"
    merged.write_text(json.dumps({**json.loads(merged.read_text()), "cost": {}}))
    assert not Page(page.run(run).read_text()).says("points per GPU-hour")
