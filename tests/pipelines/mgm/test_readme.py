"""What the model's README says: its example runs, and the tests that it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pipelines.sample.world import MODELS

from .conftest import noise_image

HERE = Path(__file__).parent
README = Path(__file__).resolve().parents[3] / "pipelines" / "mgm" / "README.md"


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The Auto classes, a chat with an image and `generate`, as for any multimodal model of transformers."""
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert code is not None and "AutoModelForImageTextToText" in code[1]
    noise_image(0).save(tmp_path / "sign.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code[1], {"DIR": str(MODELS / "mgm")})
    assert "what does it say" in capsys.readouterr().out.lower()  # prompt and answer


def test_every_test_in_the_table_exists() -> None:
    named = set(re.findall(r"`(test_\w+\.py)(?:::(\w+))?`", README.read_text()))
    assert len(named) > 20
    for file, test in named:
        path = next(
            folder / file
            for folder in (HERE, HERE.parent / "adapters", HERE.parent / "train")
            if (folder / file).exists()
        )
        assert not test or f"\ndef {test}(" in path.read_text(), f"{file}::{test}"
