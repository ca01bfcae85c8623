"""An MGM from its parts: a language model, a CLIP, an OpenCLIP ConvNeXt, and a projector that has learned nothing yet.

This is where the original's first stage begins (`initialize_vision_modules` and `initialize_uni_modules` of its
mgm_arch.py): projector and uni-modules are plain `nn.Linear` and `nn.LayerNorm` with torch's own initial values, drawn
here from a seed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from pipelines.errors import UserError
from pipelines.lock import release
from pipelines.manifest import open_stage
from pipelines.mgm import names, parts
from pipelines.mgm.assemble_config import AssembleConfig, check_language_model, check_mgm, inputs
from pipelines.mgm.configuration import MGMConfig
from pipelines.mgm.convert_config import build_text_config, clip_config, convnext_config, is_tied
from pipelines.mgm.tensorfiles import ShardWriter, read_file
from pipelines.mgm.vision import MGMUniProjector, build_projector
from pipelines.modelfiles import weight_files
from pipelines.progress import say

_WORK = "_work"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(config: AssembleConfig, output: Path | str, *, restart: bool = False) -> dict[str, Any]:
    """Write the base that a recipe's `assemble` section describes, or find it written; returns the manifest.

    Raises:
        UserError: as `assemble` and `assemble_from`, or `output` holds something else.
    """
    output = Path(output)
    stage = open_stage(output, "assemble", inputs(config), restart=restart)
    if stage.complete:
        return stage.manifest
    say(f"assemble: {', '.join(map(str, config.parts().values()))}")
    work = output / _WORK
    shutil.rmtree(work, ignore_errors=True)  # of a killed run: a base is made in a minute
    try:
        made = (
            assemble_from(config.parts()["from_mgm"], work, config.seed) if config.from_mgm else assemble(config, work)
        )
        for path in work.iterdir():
            _replace(path, output / path.name)
        work.rmdir()
    except BaseException:
        release(output)
        shutil.rmtree(output)
        raise
    return stage.finish(language_model=made.text_config.model_type, tokens_per_image=made.num_image_tokens)


def _replace(source: Path, target: Path) -> None:
    """Move a file or folder; what a killed run had moved already is the same."""
    if target.is_dir():
        shutil.rmtree(target)
    source.replace(target)


def assemble(config: AssembleConfig, output: Path) -> MGMConfig:
    """Write a model directory whose projector is fresh.

    Args:
        config: with a language model and two towers.
        output: created; must be empty if it exists. Nothing is left there when something is wrong.

    Returns:
        The configuration written.

    Raises:
        UserError: another kind of model, no tokenizer, unreadable files, missing or unaccounted tensors, wrong shapes,
            or parts that do not fit each other.
    """
    for _, check in config.checks():
        check()
    parts.new_directory(output)
    try:
        return _assemble(config, output)
    except BaseException:
        shutil.rmtree(output)
        raise


def _assemble(how: AssembleConfig, output: Path) -> MGMConfig:
    language_model, clip, openclip = how.parts().values()
    text = check_language_model(language_model)
    text_type = str(text["model_type"])
    writer = ShardWriter(output, dtype=_DTYPES.get(how.dtype))
    _, _, found = parts.rename_tensors(language_model, writer, drop_head=is_tied(text, text_type))
    writer.dtype = writer.dtype or found  # towers are published in float32, language models in half of that
    foreign = [name for name in writer.shapes if name.startswith((*names.PROJECTOR, *names.TOWERS))]
    if foreign:
        raise UserError(
            f"{language_model}: holds {len(foreign)} tensors of an MGM, e.g. {foreign[0]}; `captune assemble --from` "
            "takes a finished one"
        )
    parts.add_tower(writer, clip, names.from_clip, "CLIP", "--clip")
    parts.add_tower(writer, openclip, names.from_openclip, "ConvNeXt", "--openclip")
    parts.check_names(writer.shapes, language_model)
    config = _config(build_text_config(text, text_type), writer.shapes, clip, how, writer.dtype)
    for name, tensor in fresh_weights(config, how.seed).items():
        writer.add(name, tensor)
    writer.close()
    parts.check_shapes(config, writer.shapes, language_model)
    (output / parts.ORIGINAL_DIR).mkdir()
    parts.copy_files(language_model, output / parts.ORIGINAL_DIR, parts.TOKENIZER_FILES)
    parts.write_processor(config, language_model, clip, output)
    config.save_pretrained(output)
    parts.generation_config(config, language_model).save_pretrained(output)
    return config


def assemble_from(model: Path, output: Path, seed: int = 0) -> MGMConfig:
    """Towers, language model and everything else of a finished MGM, with a projector that has learned nothing.

    Args:
        model: directory of an MGM as captune writes them.
        output, seed: see `assemble`.

    Raises:
        UserError: not such a directory, or its tensors are not those of its configuration.
    """
    check_mgm(model)
    parts.new_directory(output)
    try:
        config: MGMConfig = MGMConfig.from_pretrained(model)
        writer = ShardWriter(output)
        dtype = None
        for file in weight_files(model):
            for name, tensor in read_file(file).items():
                if not name.startswith(names.PROJECTOR):
                    writer.add(name, tensor)
                    dtype = tensor.dtype if name == names.EMBEDDING else dtype
        for name, tensor in fresh_weights(config, seed).items():
            writer.add(name, tensor if dtype is None else tensor.to(dtype))
        writer.close()
        parts.check_shapes(config, writer.shapes, model)
        _copy_rest(model, output)
    except BaseException:
        shutil.rmtree(output)
        raise
    return config


def fresh_weights(config: MGMConfig, seed: int) -> dict[str, torch.Tensor]:
    """Projector and uni-modules with torch's initial values, float32, named as in the model.

    The random numbers of the process are left as they were.
    """
    width, width_aux = config.vision_config.hidden_size, sum(config.vision_config_aux.hidden_sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = {
            "multi_modal_projector": build_projector(config),
            "uni_query": MGMUniProjector(width, width),
            "uni_key": MGMUniProjector(width_aux, width),
            "uni_value": MGMUniProjector(width_aux, width),
        }
    return {f"model.{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}


def _config(
    text: dict[str, Any], shapes: dict[str, tuple[int, ...]], clip: Path, how: AssembleConfig, dtype: torch.dtype | None
) -> MGMConfig:
    try:
        config = MGMConfig(
            text_config=text,
            vision_config=clip_config(shapes, clip),
            vision_config_aux=convnext_config(shapes),
            image_token_id=text["vocab_size"],  # until the tokenizer says otherwise
            mm_projector_type=how.projector,
            vision_select_layer=how.select_layer,
            image_size_aux=how.image_size_aux,
            image_grid=how.image_grid,
            image_global=how.image_global,
            dtype=dtype,
        )
    except ValueError as error:
        raise UserError(f"these parts do not make an MGM: {error}") from error
    config.architectures = ["MGMForConditionalGeneration"]
    return config


def _copy_rest(model: Path, output: Path) -> None:
    """Configuration, tokenizer, processor, template: all but the weights, and what stages say of themselves."""
    weights = {file.name for file in weight_files(model)}
    for path in sorted(model.iterdir()):
        if path.name in weights or path.name.endswith(".index.json") or path.name.startswith((".", "MANIFEST", _WORK)):
            continue
        if path.is_dir():
            shutil.copytree(path, output / path.name)
        else:
            shutil.copyfile(path, output / path.name)
