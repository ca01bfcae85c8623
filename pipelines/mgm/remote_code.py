"""Model directories that carry their own modelling code, for machines without captune."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from pipelines.errors import UserError
from pipelines.modelfiles import read_object

# These import nothing of captune but each other, by relative imports.
_FILES = ["configuration.py", "image_processing.py", "modeling.py", "processing.py", "templates.py", "vision.py"]
_MODEL_MAP = {
    "AutoConfig": "configuration.MGMConfig",
    "AutoModel": "modeling.MGMModel",
    "AutoModelForImageTextToText": "modeling.MGMForConditionalGeneration",
}
_PROCESSOR_MAP = {
    "AutoImageProcessor": "image_processing.MGMImageProcessor",
    "AutoProcessor": "processing.MGMProcessor",
}


def add_remote_code(model_dir: str | Path) -> None:
    """Copy the modelling code into a saved model and point `auto_map` at it.

    Afterwards `AutoModelForImageTextToText.from_pretrained(dir, trust_remote_code=True)` and the other Auto classes
    work with transformers alone.

    Raises:
        UserError: not a saved MGM model.
    """
    model_dir = Path(model_dir)
    if read_object(model_dir / "config.json").get("model_type") != "mgm":
        raise UserError(f"{model_dir / 'config.json'}: not an MGM model")
    for name in _FILES:
        shutil.copyfile(Path(__file__).parent / name, model_dir / name)
    _add_map(model_dir / "config.json", _MODEL_MAP)
    for name in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if (model_dir / name).exists():
            _add_map(model_dir / name, _PROCESSOR_MAP)


def _add_map(path: Path, classes: dict[str, str]) -> None:
    config = read_object(path)
    if path.name == "tokenizer_config.json":  # here `auto_map` means tokenizers, and there is no custom one
        classes = {key: value for key, value in classes.items() if key == "AutoProcessor"}
    config["auto_map"] = config.get("auto_map", {}) | classes
    if isinstance(config.get("image_processor"), dict):
        config["image_processor"]["auto_map"] = classes
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
