"""The engine says exactly what BLIP-2 says, however it is batched, and refuses a directory that is no complete
BLIP-2.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Blip2ForConditionalGeneration, Blip2Processor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from pipelines.blip2.config import CandidateConfig, DecodingConfig
from pipelines.blip2.engine import BlipCaptioner, Request
from pipelines.caption.config import CaptionConfig
from pipelines.errors import UserError, WorkFailed

from ..tiny_blip2 import make_blip2, picture

PROMPTS = ["", "a red", "two blue circles left of", "a"]


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    sizes = [(80, 60), (31, 97), (32, 32), (400, 20), (5, 5), (200, 300)]
    return [Image.open(io.BytesIO(picture(seed, size))).convert("RGB") for seed, size in enumerate(sizes)]


def requests(count: int, prompts: list[str] | None = None) -> list[Request]:
    noise = np.random.default_rng(5).integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
    texts = prompts or [""]
    return [Request(pixels, f"id{row}", texts[row % len(texts)]) for row, pixels in enumerate(noise)]


def reference(engine: BlipCaptioner, request: Request, **options: object) -> list[list[int]]:
    """Plain `generate` of one unpadded row: new tokens of every sequence, up to the end token."""
    model, inputs = engine.model, {}
    queries = model.config.num_query_tokens
    if request.prompt:
        ids = [model.config.image_token_id] * queries + engine.tokenizer(request.prompt).input_ids
        inputs["input_ids"] = torch.tensor([ids])
    pixels = engine.normalize(torch.from_numpy(request.pixels[None]))
    limit = engine.config.max_new_tokens
    found = model.generate(pixel_values=pixels, **inputs, max_new_tokens=limit, do_sample=False, **options)
    skip = 1 if model.language_model.config.is_encoder_decoder else len(ids) if request.prompt else queries + 1
    ends = model.language_model.generation_config.eos_token_id
    rows = []
    for row in found[:, skip:].tolist():
        last = next((place for place, token in enumerate(row) if token in ends), len(row))
        rows.append(row[: last + 1])
    return rows


@pytest.mark.parametrize("prompt", ["", "a red"])
def test_equals_plain_generate(blip2: Path, photos: list[Image.Image], prompt: str) -> None:
    """uint8 pixels, own normalization and batching change no token against processor + `generate`, with and without a
    prompt, where Pillow resizes, as the processor does.
    """
    engine = BlipCaptioner(blip2, CaptionConfig(prompt=prompt, max_new_tokens=12, resize="pillow"))
    processor = Blip2Processor.from_pretrained(blip2)
    processor.image_processor = BlipImageProcessorPil.from_pretrained(blip2)  # torchvision's, where it is, resizes anew
    model = Blip2ForConditionalGeneration.from_pretrained(blip2).eval()
    inputs = processor(images=photos, text=[prompt] * len(photos) if prompt else None, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)

    pixels = engine.preprocess(photos)
    assert pixels.dtype == np.uint8 and pixels.shape == (6, 3, 32, 32)
    torch.testing.assert_close(engine.normalize(torch.from_numpy(pixels)), inputs["pixel_values"], atol=1e-6, rtol=0)
    prefix = inputs["input_ids"].shape[1] if prompt else 5
    new = expected[:, prefix:]
    assert [row[0] for row in engine.generate(Request(image) for image in pixels)] == new.tolist()
    captions = [row.chosen for row in engine.caption(pixels)]
    assert captions == [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    assert len(set(captions)) > 1, "a model that says the same of everything would prove nothing"


def test_slots_come_and_go_without_a_trace(ending: Path) -> None:
    """OPT and T5, prompts of many lengths, captions of many lengths, slots refilled and moved: each row is plain
    `generate` of it alone.
    """
    stream = requests(40, PROMPTS)
    expected: list[list[int]] = []
    for batch_size in (64, 5, 1):
        engine = BlipCaptioner(ending, CaptionConfig(max_new_tokens=16, batch_size=batch_size))
        expected = expected or [reference(engine, request)[0] for request in stream]
        assert [tokens[0] for tokens in engine.generate(stream)] == expected
    assert len({len(tokens) for tokens in expected}) > 5, "captions of one length would prove nothing"


@pytest.mark.parametrize("method", ["sample", "beam"])
def test_a_stream_may_pause(ending: Path, method: str) -> None:
    """Where a stream has nothing at the moment, slots go on with what is in them; the stream ends for the engine when
    they are empty.
    """
    config = CaptionConfig(max_new_tokens=16, batch_size=4, decoding=DecodingConfig(method=method))
    engine = BlipCaptioner(ending, config)
    wanted = requests(12, PROMPTS)
    expected = engine.caption(
        np.stack([request.pixels for request in wanted]), [f"id{n}" for n in range(12)], PROMPTS * 3
    )
    asked = []

    def slowly() -> Iterator[Request | None]:
        yield from [*wanted[:3], None, None, *wanted[3:10], None, wanted[10]]
        while True:
            asked.append(len(asked))
            yield None

    found = dict(engine.captions(slowly()))
    taken = [found[place].chosen for place in sorted(found)]
    if method == "sample":
        assert sorted(found) == [0, 1, 2, *range(5, 12), 13] and 1 < len(asked) <= 17
        assert taken == [said.chosen for said in expected[:11]]
    else:  # a batch is searched as a whole, so nothing goes on while the stream pauses
        assert taken == [said.chosen for said in expected[: len(taken)]] and len(taken) >= 3


def test_minimum_and_own_limits(ending: Path) -> None:
    """No end token before `min_new_tokens`; a request's own limit ends its row alone."""
    config = CaptionConfig(max_new_tokens=16, batch_size=4, decoding=DecodingConfig(min_new_tokens=6))
    engine = BlipCaptioner(ending, config)
    stream = requests(12)
    found = [tokens[0] for tokens in engine.generate(stream)]
    assert found == [reference(engine, request, min_new_tokens=6)[0] for request in stream]
    assert min(map(len, found)) >= 6
    short = [Request(request.pixels, max_new_tokens=2 + row) for row, request in enumerate(stream[:5])]
    assert [tokens[0] for tokens in engine.generate(short)] == [row[: 2 + i] for i, row in enumerate(found[:5])]


def test_idle_slots_stay_inside_the_model(ending: Path) -> None:
    """A caption may use the model's last position; slots that ended near it idle on beside it without leaving the
    model's tables.
    """
    config = CaptionConfig(max_new_tokens=59, batch_size=32, decoding=DecodingConfig(min_new_tokens=59))
    engine = BlipCaptioner(ending, config)
    pixels = [request.pixels for request in requests(4)]
    short = [Request(image, prompt="a red " * 12, max_new_tokens=2) for image in pixels[:3]]
    found = [tokens[0] for tokens in engine.generate([*short, Request(pixels[3])])]
    assert [len(tokens) for tokens in found] == [2, 2, 2, 59]
    assert found[3] == reference(engine, Request(pixels[3]), min_new_tokens=59)[0]


def test_beam_search_equals_plain_generate(ending: Path) -> None:
    """Beams over features that were computed once, padded in a batch: the same beams, in the same order, as each row
    alone.
    """
    decoding = DecodingConfig(method="beam", beams=3, length_penalty=0.6)
    config = CaptionConfig(max_new_tokens=10, batch_size=8, decoding=decoding, candidates=CandidateConfig(count=2))
    engine = BlipCaptioner(ending, config)
    stream = requests(10, PROMPTS)
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.6}
    assert engine.generate(stream) == [reference(engine, request, **options) for request in stream]


def test_images_go_through_the_towers_once(blip2: Path) -> None:
    """However many candidates there are."""
    decoding, candidates = DecodingConfig(method="sample"), CandidateConfig(count=5)
    engine = BlipCaptioner(
        blip2, CaptionConfig(max_new_tokens=4, batch_size=8, decoding=decoding, candidates=candidates)
    )
    seen: list[int] = []
    embeddings = engine.model.vision_model.embeddings
    embeddings.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    assert all(len(tokens) == 5 for tokens in engine.generate(requests(20)))
    assert sum(seen) == 20


def test_a_prompt_without_room_fails_its_row_alone(blip2: Path) -> None:
    """64 positions, 4 for the image: the row says why; its neighbours are captioned as ever, in their order."""
    engine = BlipCaptioner(blip2, CaptionConfig(max_new_tokens=8, batch_size=2))
    stream = requests(5)
    pixels = np.stack([request.pixels for request in stream])
    alone = engine.caption(pixels)
    rows = engine.caption(pixels, prompts=[None, None, "a red sign " * 30, None, None])
    assert rows[2].chosen is None and rows[2].candidates == [] and (rows[2].error or "").startswith("prompt too long")
    assert [row.chosen for row in rows[:2] + rows[3:]] == [row.chosen for row in alone[:2] + alone[3:]]
    assert engine.caption(pixels[:1], prompts=["a red sign " * 30])[0].error


def test_out_of_memory_halves_the_batch_and_loses_nothing(
    ending: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Memory runs out in the towers and in the middle of decoding: every caption still comes, once, and is the same."""
    decoding, candidates = DecodingConfig(method="sample"), CandidateConfig(count=2)
    config = CaptionConfig(max_new_tokens=12, batch_size=12, decoding=decoding, candidates=candidates)
    stream = requests(30, PROMPTS)
    expected = BlipCaptioner(ending, config).generate(stream)

    engine = BlipCaptioner(ending, config)
    features, step, steps = engine.features, engine._decoder.step, []

    def small_towers(pixels: torch.Tensor) -> torch.Tensor:
        if len(pixels) > 6:
            raise torch.OutOfMemoryError
        return features(pixels)

    def small_steps(tokens: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        steps.append(len(tokens))
        if len(tokens) > 3 and len(steps) > 9:
            raise torch.OutOfMemoryError
        return step(tokens, positions, length)

    monkeypatch.setattr(engine, "features", small_towers)
    monkeypatch.setattr(engine._decoder, "step", small_steps)
    assert engine.generate(stream) == expected
    assert engine.batch_size == 3
    assert capsys.readouterr().err.count("out of memory") == 2
    assert engine.generate(stream) == expected
    assert capsys.readouterr().err == ""

    def no_towers(pixels: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine, "features", no_towers)
    with pytest.raises(WorkFailed, match="a single image"):
        engine.generate(stream)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_no_images(ending: Path, dtype: str) -> None:
    """16-bit weights load and run; transformers keeps the Q-Former of a float16 model in 32 bits; an empty batch is no
    error.
    """
    engine = BlipCaptioner(ending, CaptionConfig(dtype=dtype, max_new_tokens=4))
    assert (engine.model.qformer.layernorm.weight.dtype == torch.float32) == (dtype == "float16")
    pixels = np.stack([request.pixels for request in requests(6)])
    assert len(engine.caption(pixels)) == 6
    assert engine.caption(pixels[:0]) == []


def test_incomplete_directories_are_refused_by_name(blip2: Path, tmp_path: Path) -> None:
    """No weights, half the weights, no or the wrong image token, another kind of model, no room: each says so."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(blip2, tmp_path / name))

    def edit(path: Path, **changes: object) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    bare = copy("bare")
    (bare / "model.safetensors").unlink()
    half = copy("half")
    weights = load_file(half / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "qformer" not in k}, half / "model.safetensors", {"format": "pt"})
    holed = copy("holed")
    weights.pop("qformer.layernorm.weight")
    weights["language_projection.bias"] = torch.ones(3)
    save_file(weights, holed / "model.safetensors", {"format": "pt"})
    torn = copy("torn")
    (torn / "model.safetensors").write_bytes((blip2 / "model.safetensors").read_bytes()[:-1])
    blind = copy("blind")
    (blind / "processor_config.json").unlink()
    other = copy("other")
    edit(other / "config.json", model_type="blip")
    moved = copy("moved")
    edit(moved / "config.json", image_token_index=1)
    nameless = copy("nameless")
    (nameless / "tokenizer.json").unlink()
    cases = [
        (bare, "bare: no weights"),
        (half, r"half: its weights have nothing named qformer\.\*"),
        (holed, r"1 missing: qformer\.layernorm\.weight; 1 of another shape: language_projection\.bias is \(3,\)"),
        (torn, "torn/model.safetensors: not a whole safetensors file"),
        (blind, "blind: the model has no processor"),
        (other, "other: .*of type 'blip', not 'blip-2'"),
        (moved, "moved: its tokenizer has '<image>' at id 3, but the model expects it at id 1"),
        (nameless, "nameless: the model has no tokenizer"),
        (make_blip2(tmp_path / "mute", image_token=False), "mute: its tokenizer lacks the image token '<image>'"),
        (tmp_path, r"config\.json is missing"),
    ]
    for directory, message in cases:
        with pytest.raises(UserError, match=message):
            BlipCaptioner(directory)
    with pytest.raises(UserError, match=r"caption\.max_new_tokens: 60 new tokens do not fit"):
        BlipCaptioner(blip2, CaptionConfig(max_new_tokens=60))
    with pytest.raises(UserError, match=r"caption\.max_new_tokens: 54 new tokens do not fit"):
        BlipCaptioner(blip2, CaptionConfig(max_new_tokens=54, prompt="extraordinarily"))
