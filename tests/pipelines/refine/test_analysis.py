"""`captune analyze`: distributions are those of every row, and a proposed recipe does what the analysis says of it."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines.records import new_record, write_shard
from ray_jobs import cli

RECIPE = """
process:
  - text_length_filter: {min_len: 20, max_len: 60}
  - words_num_filter: {min_num: 2}
  - whitespace_normalization_mapper:
  - image_shape_filter: {min_width: 40, min_height: 1}
  - suffix_filter: {suffixes: []}
  - document_deduplicator: {}
"""


def picture(width: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, 30), (width % 256, 80, 120)).save(stream, "PNG")
    return stream.getvalue()


def filters(folder: Path, text: str = RECIPE) -> str:
    path = folder / "filters.yaml"
    path.write_text(text)
    return str(path)


def captions(folder: Path, count: int = 120) -> Path:
    """Records of growing captions and widths, images inside and beside them; three that no filter can see."""
    rows: list[Any] = []
    for number in range(count):
        data = picture(32 + number)
        path = folder / f"{number}.png"
        path.write_bytes(data)
        held = {"image": data} if number % 2 else {"image_uri": str(path), "content": data}
        rows.append(new_record("x", **held) | {"recaption": f"{number:03d} sign " + "a" * (number % 60)})
    rows.append(new_record("x", image=picture(300)) | {"recaption": "  "})
    rows.append(new_record("x", image_uri=str(folder / "gone.png")) | {"recaption": "a sign without a file"})
    rows.append(new_record("x", image_uri="y.png", error="broken image: y.png"))
    for part in (0, 1):
        write_shard(folder / "captions" / f"part-{part}.parquet", rows[part::2])
    return folder / "captions"


def analyze(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["analyze", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.heavy  # workers that import Data-Juicer
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("by", [["--analyze.keep", "0.4"], ["--analyze.by", "sigma", "--analyze.sigma", "1.5"]])
def test_refine_keeps_what_the_analysis_said(by: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the recipe as it is and by the proposed one, to the row; and `keep` comes as near as rows allow."""
    data, recipe = str(captions(tmp_path)), filters(tmp_path)
    out = tmp_path / "analysis"
    found = analyze(capsys, data, "--refine.recipe", recipe, "--output", str(out), *by)
    assert found["looked_at"] == found["rows"] == 123 and found["not_measured"] == ["document_deduplicator"]
    assert sum(found["unusable"].values()) == 3
    for name, share in ((recipe, found["kept"]), (str(out / "recipe.yaml"), found["proposed"]["kept"])):
        refined = tmp_path / Path(name).parent.name / "refined"
        assert cli.main(["refine", data, "--output", str(refined), "--refine.recipe", name]) == 0
        kept = json.loads((refined / "MANIFEST.json").read_text())["kept"]
        assert kept == round(share * 123)
    if "--analyze.keep" in by:
        assert 0.4 <= found["proposed"]["kept"] < 0.4 + 3 / 123


def test_bounds_are_quantiles_of_what_every_row_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A filter looks at rows that the ones before it reject, too; only bounds that the recipe gives are moved, whole
    numbers stay whole, and what one filter alone costs is counted.
    """
    recipe = filters(tmp_path)
    found = analyze(capsys, str(captions(tmp_path)), "--refine.recipe", recipe, "--analyze.quantile", "0.1")
    by_label = {operator["label"]: operator for operator in found["operators"]}
    (length,) = by_label["text_length_filter"]["stats"]
    lengths = np.array([len(f"{n:03d} sign " + "a" * (n % 60)) for n in range(120)])
    assert length["percentiles"]["50"] == np.percentile(lengths, 50) and length["mean"] == pytest.approx(lengths.mean())
    assert sum(length["histogram"]["counts"]) >= 0.99 * len(lengths)
    low, high = length["bounds"]
    assert (low["parameter"], low["value"], high["parameter"], high["value"]) == ("min_len", 20, "max_len", 60)
    assert low["proposed"] == np.quantile(lengths, 0.1, method="inverted_cdf") and isinstance(low["proposed"], int)
    assert low["cuts"] == pytest.approx((lengths < 20).mean()) and 0.05 < high["proposed_cuts"] <= 0.1
    now = low["examples"][0]
    assert (now["at"], [row["value"] for row in now["kept"]], now["rejected"][0]["value"]) == ("now", [20, 20, 21], 19)
    assert [bound["parameter"] for bound in by_label["words_num_filter"]["stats"][0]["bounds"]] == ["min_num"]
    widths = {stat["name"]: stat for stat in by_label["image_shape_filter"]["stats"]}
    assert widths["image_width"]["bounds"][0]["proposed"] == np.quantile(np.arange(32, 152), 0.1, method="inverted_cdf")
    wrong_width, wrong_length = np.arange(32, 152) < 40, (lengths < 20) | (lengths > 60)
    assert by_label["image_shape_filter"]["alone"] == pytest.approx((wrong_width & ~wrong_length).mean())
    mapper = by_label["whitespace_normalization_mapper"]
    assert mapper["stats"] == [] and mapper["kept"] == 1
    names = found["correlations"]["stats"]
    matrix = np.array(found["correlations"]["matrix"], dtype=float)
    assert set(names) == {"text_len", "num_words", "image_width"}  # all pictures have one height
    assert np.allclose(np.diag(matrix), 1) and np.allclose(matrix, matrix.T)


def test_any_dataset_is_drawn_alike_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a dataset that is no records, the same rows whenever asked; the page shows them, loads nothing and escapes."""
    lines = []
    for number in range(90):
        (tmp_path / f"{number}.png").write_bytes(picture(40 + number))
        text = f"<script>alert({number})</script>" if number % 3 else f"a sign that says {number}"
        lines.append(json.dumps({"text": f"<__dj__image> {text} <|__dj__eoc|>", "images": [f"{number}.png"]}))
    lines += [json.dumps({"text": "<__dj__image> no file <|__dj__eoc|>", "images": ["none.png"]}), "no json"]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(lines))
    once, twice = (
        analyze(capsys, str(data), "--analyze.rows", "30", "--output", str(tmp_path / name)) for name in ("a", "b")
    )
    assert once == twice and (once["rows"], once["looked_at"]) == (92, 30)
    assert (tmp_path / "a" / "index.html").read_bytes() == (tmp_path / "b" / "index.html").read_bytes()
    page = (tmp_path / "a" / "index.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and "data:image/jpeg;base64," in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page)
    other = analyze(capsys, str(data), "--analyze.rows", "30", "--analyze.seed", "1")
    assert other["operators"] != once["operators"]
    process = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())["process"]
    assert [name for entry in process for name in entry] == [operator["label"] for operator in once["operators"]]
    assert cli.main(["analyze", str(data), "--analyze.rows", "0"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("92 of 92 rows looked at") and "min_len 4" in text and "1 missing file, 1 bad row" in text


def test_what_cannot_be_analyzed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert cli.main(["analyze", *words]) == 2
        return capsys.readouterr().err

    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "<__dj__image> a sign <|__dj__eoc|>", "images": ["none.png"]}) + "\n")
    assert "none of 1 rows has a text and a picture: 1 missing file" in refused(str(data))
    assert "no such file" in refused(str(tmp_path / "none.jsonl"))
    assert "analyze.keep is a share above 0" in refused(str(data), "--analyze.keep", "58")
    assert "analyze.quantile" in refused(str(data), "--analyze.quantile", "0.5")
    assert "did you mean" in refused(
        str(data), "--refine.recipe", filters(tmp_path, "process:\n  - text_lenght_filter:")
    )
