"""A tiny random MGM with a real tokenizer, and a training set of coloured squares. Shared by the train and adapters
tests.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


def tokenizer() -> Any:
    """Of the kind that Gemma has."""
    from tests.tiny_tokenizers import tokenizer_for

    return tokenizer_for("gemma")


def write_model(
    directory: Path,
    *,
    layers: int = 2,
    hidden: int = 32,
    dtype: str = "float32",
    tie: bool = True,
    spread: float = 0.02,
) -> Path:
    """Save a random MGM (16 visual tokens an image) and its processor.

    Args:
        spread: standard deviation of the language model's weights; with a large one it answers different things to
            different questions.
    """
    import torch
    from transformers import CLIPVisionConfig, GemmaConfig

    from pipelines.mgm.configuration import MGMConfig, MGMConvNextConfig
    from pipelines.mgm.modeling import MGMForConditionalGeneration
    from pipelines.mgm.processing import MGMProcessor

    tok = tokenizer()
    config = MGMConfig(
        text_config=GemmaConfig(
            vocab_size=len(tok),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=max(8, hidden // 4),
            intermediate_size=2 * hidden,
            max_position_embeddings=512,
            initializer_range=spread,
            tie_word_embeddings=tie,
            bos_token_id=tok.bos_token_id,
            eos_token_id=tok.eos_token_id,
            pad_token_id=tok.pad_token_id,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        ),
        vision_config_aux=MGMConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, layer_scale_init_value=0.5
        ),
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        image_size_aux=64,
    )
    torch.manual_seed(0)
    model = MGMForConditionalGeneration(config).to(getattr(torch, dtype))
    model.generation_config.eos_token_id = [tok.eos_token_id, tok.convert_tokens_to_ids("<end_of_turn>")]
    model.generation_config.pad_token_id = tok.pad_token_id
    model.save_pretrained(directory)
    MGMProcessor.from_config(config, tok).save_pretrained(directory)
    return directory


def jpeg(colour: str, shade: int = 0, size: tuple[int, int] = (48, 40)) -> bytes:
    """Encoded bytes of a one-colour picture."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", size, tuple(max(0, part - shade) for part in COLOURS[colour])).save(buffer, "JPEG")
    return buffer.getvalue()


def write_dataset(directory: Path, rows: int = 12, *, broken: int = 0, in_record: bool = True) -> Path:
    """A refined dataset: `rows` good records and `broken` ones whose image does not decode."""
    from pipelines.manifest import open_stage
    from pipelines.records import new_record, write_shard

    stage = open_stage(directory, "refine", {"text": "recaption", "rows": rows})
    names = list(COLOURS)
    records = []
    for number in range(rows + broken):
        colour = names[number % len(names)]
        data = jpeg(colour, shade=number) if number < rows else b"\xff\xd8 no picture %d" % number
        uri = None
        if not in_record:
            uri = str(directory.parent / f"{directory.name}-{number}.jpg")
            Path(uri).write_bytes(data)
        record = new_record("junk", image=data if in_record else None, image_uri=uri, content=data)
        record["recaption"], record["keep"] = f"a square of the colour {colour}.", True
        records.append(record)
    write_shard(directory / "part-0.parquet", records[::2])
    write_shard(directory / "part-1.parquet", records[1::2])
    stage.finish(text="recaption", rows_in=len(records), kept=len(records))
    return directory


def write_instructions(path: Path, rows: int = 8, text_only: int = 0) -> Path:
    """A LLaVA JSON beside an `images` folder."""
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    entries = []
    for number in range(rows):
        colour = list(COLOURS)[number % len(COLOURS)]
        (path.parent / "images" / f"{number}.jpg").write_bytes(jpeg(colour, shade=number))
        turns = [
            {"from": "human", "value": "<image>\nwhat is the colour ?"},
            {"from": "gpt", "value": colour},
        ]
        entries.append({"id": str(number), "image": f"images/{number}.jpg", "conversations": turns})
    for number in range(text_only):
        turns = [{"from": "human", "value": "what is a square ?"}, {"from": "gpt", "value": "a square."}]
        entries.append({"id": f"text-{number}", "conversations": turns})
    path.write_text(json.dumps(entries))
    return path


def loader(
    model_dir: Path,
    data: Path,
    phase: str,
    *,
    micro_batch: int = 4,
    accumulation: int = 1,
    seed: int = 0,
    template: str = "auto",
    threads: int = 1,
) -> Any:
    """The batches of one phase for a single worker."""
    from pipelines.mgm.load import load_processor
    from pipelines.train.data import Loader, Sampler, Share, Templates
    from pipelines.train.rows import read_rows

    processor = load_processor(model_dir)
    rows = read_rows(data)
    return Loader(
        rows,
        getattr(Templates(processor, 512, **{phase: template}), phase),
        processor.image_processor.resize,
        Sampler(len(rows), seed, phase),
        Share(0, 1, micro_batch, accumulation),
        processor.tokenizer.pad_token_id,
        threads,
    )


def learning(model_dir: Path, phase: Any = "instruct", *, checkpointing: bool = False, **settings: Any) -> Any:
    """A model whose `phase` learns with these settings of `train`, and the `Method` that it learns by."""
    from pipelines.mgm.load import load_model
    from pipelines.train.config import LoraSettings, TrainConfig
    from pipelines.train.methods import make_learn, quantization
    from pipelines.train.step import prepare

    settings = {"precision": "float32", "lora": LoraSettings(rank=4, alpha=8, dropout=0.0)} | settings
    config = TrainConfig(**settings)
    packed = quantization(config)
    model = load_model(model_dir, "float32", **({"quantization_config": packed} if packed else {}))
    method = make_learn(model, config.phase(phase), config)
    prepare(model, checkpointing)
    return model, method


def engine(model: Any, model_dir: Path, phase: Any, precision: str = "float32", method: Any = None) -> Any:
    """A `TorchEngine` on the CPU for a model that is ready to train."""
    import torch

    from pipelines.mgm.load import load_processor
    from pipelines.train.step import TorchEngine, TrainForward

    forward = TrainForward(model, load_processor(model_dir).image_processor.normalize, method)
    return TorchEngine(forward, phase, precision, torch.device("cpu"))


def train_adapter(
    model_dir: Path, data: Path, directory: Path, *, lora: bool = True, steps: int = 3, method: str = "lora"
) -> Path:
    """A trained adapter directory, made without Ray; without `lora` only projector and uni-modules learn."""
    from pipelines.mgm.adapter import write_adapter
    from pipelines.modelfiles import model_identity
    from pipelines.train.config import PhaseConfig
    from pipelines.train.step import learning_rate

    phase = PhaseConfig(steps=steps, learning_rate=1e-2, warmup=0.0)
    model, how = learning(model_dir, "instruct" if lora else "align", method=method, instruct=phase, align=phase)
    if how.peft_config is not None:
        how.peft_config.base_model_name_or_path = str(model_dir)
    learner = engine(model, model_dir, phase, method=how)
    batches = loader(model_dir, data, "instruct" if data.is_file() else "align")
    for step, batch in enumerate(batches.steps(0, steps)):
        learner.step(batch, learning_rate(phase, step))
    write_adapter(directory, learner.weights(), how.peft_config, base=model_identity(model_dir))
    return directory
