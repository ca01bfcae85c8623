"""A tiny random MGM and builders of what trains on it, for the tests of training and of adapters."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_mgm", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny() -> Any:
    """Builders of tiny models and data sets."""
    return _load(Path(__file__).parent / "train" / "tiny_mgm.py")


@pytest.fixture(scope="session")
def model_dir(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random MGM on disk."""
    return tiny.write_model(tmp_path_factory.mktemp("mgm") / "model")
