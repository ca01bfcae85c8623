from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.report import page

from .synthetic_run import build


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one seed; tests that change it copy it."""
    return build(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="session")
def html(finished: Path) -> str:
    """Its page."""
    return page.run(finished).read_text(encoding="utf-8")
