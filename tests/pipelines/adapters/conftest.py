from __future__ import annotations

import importlib.util
import os
import shutil
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
    return _load(Path(__file__).parent.parent / "train" / "tiny_mgm.py")


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
def mixtral_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a Mixtral for a language model."""
    from transformers import MixtralConfig

    from pipelines.mgm.configuration import MGMConfig
    from pipelines.mgm.modeling import MGMForConditionalGeneration

    config = MGMConfig.from_pretrained(model_dir)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vocabulary = config.text_config.vocab_size
    config.text_config = MixtralConfig(vocab_size=vocabulary, num_key_value_heads=1, num_local_experts=2, **sizes)
    config.tie_word_embeddings = False
    directory = shutil.copytree(model_dir, tmp_path_factory.mktemp("mixtral") / "model")
    model = MGMForConditionalGeneration(config)
    model.generation_config.eos_token_id = [1, 5]
    model.save_pretrained(directory)
    return directory
