"""The `assemble` section of a recipe: what the base is made of, before anything is trained on it. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.modelfiles import TOKENIZER, model_identity, read_object, weight_files

LANGUAGE_MODELS = ("gemma", "llama", "mistral", "mixtral")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_PARTS = ("language_model", "clip", "openclip")


@dataclass
class AssembleConfig:
    """An MGM with a projector that has learned nothing, written to `train.model`; nothing is made while no part is
    named.

    Attributes:
        language_model: Hugging Face directory of a Gemma, Llama (Vicuna, Yi, ...), Mistral or Mixtral, with tokenizer.
        clip: Hugging Face directory of a CLIP, or of its vision model.
        openclip: OpenCLIP directory of a CLIP whose image tower is a ConvNeXt.
        from_mgm: a finished MGM whose language model and towers are taken, instead of the three.
        projector: mm_projector_type: linear, identity or mlp{N}x_gelu.
        image_size_aux: side in pixels of the image that feeds ConvNeXt.
        image_grid: 1, or N to cut the image into N x N crops for CLIP ("HD").
        image_global: HD only: the whole image's tokens, too.
        select_layer: CLIP's hidden state that is used.
        dtype: of every tensor written: auto (the language model's), float32, bfloat16 or float16.
        seed: of the fresh weights.
    """

    language_model: str = ""
    clip: str = ""
    openclip: str = ""
    from_mgm: str = ""
    projector: str = "mlp2x_gelu"
    image_size_aux: int = 768
    image_grid: int = 1
    image_global: bool = False
    select_layer: int = -2
    dtype: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"assemble.dtype must be one of {', '.join(DTYPES)}, not '{self.dtype}'")

    @property
    def wanted(self) -> bool:
        """There is something to make."""
        return bool(self.from_mgm or any(getattr(self, name) for name in _PARTS))

    def parts(self) -> dict[str, Path]:
        """Key -> directory, of those that it is made of."""
        names = ("from_mgm",) if self.from_mgm else _PARTS
        return {name: Path(getattr(self, name)) for name in names}

    def checks(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """A key, and what raises `UserError` when that part cannot be used."""
        look: dict[str, Callable[[Path], object]] = {"language_model": check_language_model, "from_mgm": check_mgm}
        own = [key.name for key in fields(self) if getattr(self, key.name) != key.default]
        for name in own if self.from_mgm else ():
            if name not in ("from_mgm", "seed"):
                yield f"assemble.{name}", _refuse
        for name in self.parts():
            yield f"assemble.{name}", partial(_look, getattr(self, name), look.get(name, _check))


def _refuse() -> None:
    raise UserError("stands beside assemble.from_mgm, which takes all of one model as it is; leave this out")


def _look(directory: str, check: Callable[[Path], object]) -> None:
    if not directory:
        raise UserError("is not set; a base takes language_model, clip and openclip, or from_mgm")
    check(Path(directory))


def _check(directory: Path) -> None:
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory")
    weight_files(directory)


def check_mgm(directory: Path) -> None:
    """Raise `UserError` when a directory is no MGM as captune writes them."""
    _check(directory)
    if read_object(directory / "config.json").get("model_type") != "mgm":
        raise UserError(f"{directory / 'config.json'}: not an MGM directory; an original checkpoint is converted first")


def check_language_model(directory: Path) -> dict[str, Any]:
    """Its configuration.

    Raises:
        UserError: another kind of model, no tokenizer, or no weights.
    """
    _check(directory)
    text = read_object(directory / "config.json")
    if text.get("model_type") not in LANGUAGE_MODELS:
        raise UserError(
            f"{directory / 'config.json'}: a '{text.get('model_type')}' model; the language model of an MGM is one of "
            f"{', '.join(LANGUAGE_MODELS)}"
        )
    if not any((directory / name).exists() for name in TOKENIZER):
        raise UserError(f"{directory}: no tokenizer there ({', '.join(TOKENIZER[:2])})")
    return text


def inputs(config: AssembleConfig) -> dict[str, Any]:
    """Everything that decides the base: what it is made of, by content, and how the parts meet."""
    how = {key: value for key, value in asdict(config).items() if key not in (*_PARTS, "from_mgm")}
    return {"config": how, "parts": {name: _identity(directory) for name, directory in config.parts().items()}}


def _identity(directory: Path) -> str:
    """Of a model directory; OpenCLIP's may have no configuration."""
    from pipelines.digests import file_digests

    if (directory / "config.json").is_file():
        return model_identity(directory)
    return " ".join(file_digests(weight_files(directory)))
