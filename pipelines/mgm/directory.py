"""What can be said about a model directory before anything heavy starts."""

from __future__ import annotations

from pathlib import Path

from pipelines.errors import UserError


def check_model_directory(model: Path | str) -> None:
    """Is this a directory that the engine can load?

    Raises:
        UserError: no directory, no configuration, no processor or no weights in it.
    """
    path = Path(model)
    if not path.is_dir():
        raise UserError(f"{path}: no such model directory")
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: not a model directory, config.json is missing")
    if not any(path.glob("*.safetensors")):
        raise UserError(f"{path}: a model directory without weights (*.safetensors); did the merge finish?")
    if not (path / "processor_config.json").is_file() and not (path / "preprocessor_config.json").is_file():
        raise UserError(f"{path}: the model has no processor (processor_config.json); it cannot take pictures")
