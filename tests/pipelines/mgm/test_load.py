"""A model directory is complete or refused: nothing that transformers would make up is ever answered with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.errors import UserError
from pipelines.mgm.directory import check_model_directory
from pipelines.mgm.load import load_model, load_processor

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
PROJ = "model.uni_query.proj.weight"


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})

    return edit


def _config(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def _shards(directory: Path, lose: str = "") -> None:
    """Two shards and their index; the tensor `lose` is named by the index only."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part if n != lose}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _lose_a_shard(directory: Path) -> None:
    _shards(directory)
    (directory / "model-00002-of-00002.safetensors").unlink()


def _cut(count: int) -> Callable[[Path], None]:
    return lambda directory: (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:count]) and None


def _lose(*names: str) -> Callable[[Path], None]:
    return lambda directory: [(directory / name).unlink() for name in names] and None


AT_A_GLANCE = {
    "no config": (_lose("config.json"), r"config\.json is missing"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), r"config\.json: not JSON"),
    "another model": (_config(model_type="blip-2"), "of type 'blip-2', not 'mgm'"),
    "original": (_config(model_type="mgm_gemma", mm_vision_tower="x"), "run captune convert"),
    "no weights": (_lose(WEIGHTS), "no weights there"),
    "half a file": (_cut(-1), "not a whole safetensors file"),
    "half a header": (_cut(100), "not a readable safetensors file"),
    "lost shard": (_lose_a_shard, "names files that are not there: model-00002"),
    "no index": (lambda d: (_shards(d), (d / INDEX).write_text("{}")), "it has no weight_map"),
    "lost in a shard": (lambda d: _shards(d, lose=PROJ), f"names 1 tensors that are not there, e.g. {PROJ}"),
    "no tower": (
        _tensors(lambda t: [t.pop(n) for n in list(t) if ".vision_tower_aux." in n]),
        r"nothing named model\.vision_tower_aux\.\*",
    ),
    "no processor": (_lose("processor_config.json"), "has no processor"),
    "no tokenizer": (_lose("tokenizer.json"), "has no tokenizer"),
    "an adapter": (lambda d: (d / "adapter_config.json").write_text("{}"), "merge it with captune merge"),
    "unfinished": (lambda d: (d / ".stage.json").write_text('{"stage": "merge"}'), "merge has not finished"),
}
WITH_A_SKELETON = {
    "missing": (_tensors(lambda t: t.pop(PROJ)), f"1 missing: {PROJ}"),
    "mismatched": (_tensors(lambda t: t.update({PROJ: torch.ones(3, 3)})), rf"{PROJ} is \(3, 3\), the configuration"),
    "too many": (_tensors(lambda t: t.update(stray=torch.ones(1))), "1 not part of the configured model: stray"),
    "impossible config": (_config(image_grid=0), "image_grid must be at least 1"),
}


@pytest.mark.parametrize("fault", [*AT_A_GLANCE, *WITH_A_SKELETON])
def test_an_incomplete_directory_is_refused(model_dir: Path, tmp_path: Path, fault: str) -> None:
    """By the loader always; most faults already by the check that needs neither torch nor a second."""
    broken = Path(shutil.copytree(model_dir, tmp_path / "broken"))
    change, message = (AT_A_GLANCE | WITH_A_SKELETON)[fault]
    change(broken)
    with pytest.raises(UserError, match=message):
        load_model(broken)
    if fault in AT_A_GLANCE:
        with pytest.raises(UserError, match=message):
            check_model_directory(broken)


def test_a_processor_that_cannot_be_used_is_refused(model_dir: Path, tmp_path: Path) -> None:
    """A torn tokenizer, and one that cannot put a conversation into words."""
    for name, message in (("tokenizer.json", "cannot be loaded"), ("chat_template.jinja", "no chat template")):
        broken = Path(shutil.copytree(model_dir, tmp_path / name))
        (broken / name).write_text("")
        with pytest.raises(UserError, match=message):
            load_processor(broken)


def test_shards_and_a_dtype(model_dir: Path, tmp_path: Path) -> None:
    """A complete sharded directory gives the same frozen model, in the dtype asked for."""
    sharded = Path(shutil.copytree(model_dir, tmp_path / "sharded"))
    _shards(sharded)
    whole, model = load_model(model_dir), load_model(sharded, "bfloat16")
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name].bfloat16()), name
