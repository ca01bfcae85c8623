from __future__ import annotations

import shutil
from pathlib import Path

import pytest


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
