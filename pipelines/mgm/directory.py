"""What can be said about an MGM directory before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.mgm.names import LANGUAGE_MODEL, MINING, TOWERS
from pipelines.modelfiles import ADAPTER, CONFIG, check_files, read_object


def check_model_directory(model: Path | str) -> dict[str, Any]:
    """Refuse a directory that is no complete MGM; milliseconds, because of weights only headers are read.

    Whether every tensor has the shape that the configuration asks for takes torch: `load.check_tensors`.

    Returns:
        Its configuration.

    Raises:
        UserError: no directory, another kind of model, or files that are missing or damaged.
    """
    path = Path(model)
    if (path / CONFIG).is_file() and "mm_vision_tower" in (config := read_object(path / CONFIG)):
        # Of the Llama variant, the original's model type is "mgm", too.
        kind = config.get("model_type")
        raise UserError(f"{path}: an original MGM checkpoint (model_type {kind!r}); run captune convert on it first")
    if (path / "adapter_config.json").exists():
        # With PEFT installed, transformers would put the adapter on the model, unasked.
        raise UserError(f"{path}: holds an adapter (adapter_config.json), not a model; merge it with captune merge")
    return check_files(path, "mgm", (*TOWERS, *MINING, LANGUAGE_MODEL))


def check_plain_directory(model: Path | str) -> dict[str, Any]:
    """`check_model_directory`, for what begins from the weights alone: training, merging, taking a model apart.

    Raises:
        UserError: as there, or the model carries an adapter.
    """
    if (Path(model) / ADAPTER).is_dir():
        raise UserError(f"{model}: carries an adapter in {ADAPTER}/; use the model that it was put on")
    return check_model_directory(model)
