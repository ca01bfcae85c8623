"""Tiny random models of both kinds, for the tests of every stage that loads one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from . import tiny_mgm
from .tiny_blip2 import make_blip2

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny() -> Any:
    """Builders of tiny models and data sets."""
    return tiny_mgm


@pytest.fixture(scope="session")
def model_dir(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random MGM on disk."""
    return tiny.write_model(tmp_path_factory.mktemp("mgm") / "model")


@pytest.fixture(scope="session")
def adapter_dir(tiny: Any, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA and projector, trained for three steps."""
    root = tmp_path_factory.mktemp("adapter")
    return tiny.train_adapter(model_dir, tiny.write_instructions(root / "instruct.json"), root / "adapter")


@pytest.fixture(scope="session")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_blip2(tmp_path_factory.mktemp("blip2"))


@pytest.fixture(scope="session", params=["opt", "t5"])
def ending(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both kinds of language model, with captions of many lengths."""
    name = f"ending_{request.param}"
    return make_blip2(tmp_path_factory.mktemp(name), language=request.param, ends=list(range(1, 300, 12)))
