"""A model directory with its own code loads where captune does not exist: in a virtual environment without it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from pipelines.mgm.modeling import MGMForConditionalGeneration
from pipelines.mgm.processing import MGMProcessor
from pipelines.mgm.remote_code import add_remote_code

SCRIPT = """
import importlib.util, json, sys
assert not any(importlib.util.find_spec(name) for name in ("pipelines", "ray_jobs", "serve", "captune")), sys.path
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
torch.set_num_threads(1)
kwargs = {"trust_remote_code": True}
model, info = AutoModelForImageTextToText.from_pretrained(sys.argv[1], output_loading_info=True, **kwargs)
assert not any(info.values()), info
processor = AutoProcessor.from_pretrained(sys.argv[1], **kwargs)
content = [{"type": "image", "image": Image.new("RGB", (40, 30), (200, 30, 30))}, {"type": "text", "text": "What?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
    tokenize=True, return_dict=True, return_tensors="pt")
model.generation_config.eos_token_id = None
out = model.eval().generate(**inputs, max_new_tokens=4, do_sample=False)
print(json.dumps({"classes": [type(model).__module__, type(processor).__module__,
type(processor.image_processor).__module__],
    "tokens": out[0].tolist()}))
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a new virtual environment that holds every installed package but captune's.

    The packages are links: `.pth` files, which point to a checkout in an editable installation, are left out.
    """
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    ours = ("pipelines", "ray_jobs", "serve", "captune", "__editable__")
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(ours) and package.suffix != ".pth":
            (packages / package.name).symlink_to(package)
    return environment / "bin" / "python"


@pytest.mark.heavy
def test_loads_without_captune(
    model: MGMForConditionalGeneration, processor: MGMProcessor, tmp_path: Path, python: Path
) -> None:
    from PIL import Image

    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    add_remote_code(tmp_path / "saved")
    shutil.move(tmp_path / "saved", tmp_path / "elsewhere")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [python, "-I", "-c", SCRIPT, str(tmp_path / "elsewhere")],  # -I: neither this folder nor variables count
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert all(module.startswith("transformers_modules.") for module in result["classes"])
    content = [{"type": "image", "image": Image.new("RGB", (40, 30), (200, 30, 30))}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        assert model.generate(**inputs, max_new_tokens=4, do_sample=False)[0].tolist() == result["tokens"]
