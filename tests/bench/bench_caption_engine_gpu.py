"""BLIP-2 OPT-2.7B at its true geometry on one GPU, from encoded JPEG to text: captune's engine, plain `generate`,
Data-Juicer's settings.

python tests/bench/bench_caption_engine_gpu.py # needs torch, transformers, Pillow and a 24 GB GPU; no Ray, no download
python tests/bench/bench_caption_engine_gpu.py --tiny # the same code on any CPU, with a toy model: proves that it runs

Weights are random and come from the architecture alone. Every caption is ended at a length of its own, 12 to 20 tokens
(as real ones are); engine and `generate` get the same lengths, and `generate` and Data-Juicer's settings get their
pixels decoded in advance or for nothing but their own pace (see each line). What is random in the weights changes no
shape, so no time.
"""

from __future__ import annotations

import argparse
import io
import random
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository: on a bare machine nothing is installed

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Blip2Config, Blip2ForConditionalGeneration, PreTrainedTokenizerFast, StoppingCriteria
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from pipelines.blip2.engine import BlipCaptioner, Request
from pipelines.blip2.pixels import spec_from_config
from pipelines.caption.config import CaptionConfig
from pipelines.images import decode

LONGEST, SHORTEST = 20, 12
IMAGE_ID, BOS_ID = 4, 2


def main() -> None:
    """Print a table."""
    args = _arguments()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = geometry(args.tiny)
    model = random_model(config, device, dtype)
    tokenizer = word_tokenizer(config.text_config.vocab_size)
    files = jpegs(64, 160 if args.tiny else 640)
    lengths = [random.Random(row).randint(SHORTEST, LONGEST) for row in range(args.images)]
    size = config.vision_config.image_size
    spec = spec_from_config({"size": {"height": size, "width": size}}, "bench")
    peak = measured_peak(device, dtype)
    flops = flops_per_image(config, sum(lengths) / len(lengths))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{name}, torch {torch.__version__}, {dtype}, {parameters / 1e9:.2f} B parameters, {args.images} images")
    print(f"{sum(flops.values()) / 1e9:.0f} GFLOP an image; matrix products reach {peak / 1e12:.2f} TFLOP/s here\n")

    engine = BlipCaptioner.of(model, tokenizer, spec, CaptionConfig(batch_size=args.batch_size, max_new_tokens=LONGEST))
    assert engine._ends == [], "captions must end at their lengths, not by chance"
    _reset_peak(device)
    rate, watch, wall = run_engine(engine, files, lengths, args.threads)
    print(f"engine, from JPEG, batch {args.batch_size}, {args.threads} decoding threads: {rate:8.1f} images/s")
    share = rate * sum(flops.values()) / peak
    print(f"  {100 * share:.0f} % of the measured peak; a million images in {1e6 / rate / 60:.0f} minutes")
    if device.type == "cuda":
        print(f"  peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    for module, seconds in watch.seconds().items():
        use = flops[module] * args.images / seconds / peak
        print(f"  {module:<9}{1e3 * seconds / args.images:8.3f} ms an image, {100 * use:3.0f} % of the peak")
    print(f"  {'other':<9}{1e3 * (wall - sum(watch.seconds().values())) / args.images:8.3f} ms an image\n")

    pixels = torch.from_numpy(np.stack([spec.pixels(decode(data)) for data in files]))
    best = 0.0
    for batch in args.plain_batches:
        plain = run_plain(model, engine, pixels, lengths, batch, args.images)
        if plain is None:
            print(f"plain generate, pixels in memory, batch {batch:>4}: out of memory")
            break
        best = max(best, plain)
        print(
            f"plain generate, pixels in memory, batch {batch:>4}: {plain:8.1f} images/s, engine is "
            f"{rate / plain:.2f}x as fast"
        )
    print(f"engine against plain generate at its best batch: {rate / best:.2f}x\n")

    slow = run_data_juicer(model, config, files, lengths, args.data_juicer_images)
    print(
        "Data-Juicer's settings (float32, batches of 8, sampling, pictures prepared in line), "
        f"{args.data_juicer_images} images: {slow:.1f} images/s, engine is {rate / slow:.1f}x as fast"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a toy model on the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int)
    parser.add_argument("--batch-size", type=int, help="captions decoded at once")
    parser.add_argument("--threads", type=int, default=16, help="threads that decode JPEGs")
    parser.add_argument("--plain-batches", type=int, nargs="+")
    parser.add_argument("--data-juicer-images", type=int)
    args = parser.parse_args()
    if args.tiny:
        args.device = "cpu"
    elif args.device == "cpu":
        parser.error("the true geometry needs a GPU; --tiny runs anywhere")
    sizes = (48, 16, [8, 16], 16) if args.tiny else (4096, 256, [8, 32, 64, 128, 256], 128)
    for key, value in zip(("images", "batch_size", "plain_batches", "data_juicer_images"), sizes, strict=True):
        if getattr(args, key) is None:
            setattr(args, key, value)
    return args


def geometry(tiny: bool) -> Blip2Config:
    """The architecture of Salesforce/blip2-opt-2.7b, or a toy of the same kind."""
    text: dict[str, Any] = dict(model_type="opt", bos_token_id=BOS_ID, eos_token_id=None, pad_token_id=1)
    if tiny:
        small = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=64)
        return Blip2Config(
            vision_config=small | dict(image_size=32, patch_size=8),
            qformer_config=small | dict(encoder_hidden_size=32, cross_attention_frequency=1),
            text_config=text | dict(vocab_size=500, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64,
            num_hidden_layers=2,
                                    num_attention_heads=2, max_position_embeddings=128),
            num_query_tokens=8, image_token_index=IMAGE_ID,
        )  # fmt: skip
    return Blip2Config(
        vision_config=dict(hidden_size=1408, intermediate_size=6144, num_hidden_layers=39, num_attention_heads=16,
                           image_size=224, patch_size=14),
        qformer_config=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                            encoder_hidden_size=1408, cross_attention_frequency=2),
        text_config=text | dict(vocab_size=50304, hidden_size=2560, word_embed_proj_dim=2560, ffn_dim=10240,
        num_hidden_layers=32,
                                num_attention_heads=32, max_position_embeddings=2048),
        num_query_tokens=32, image_token_index=IMAGE_ID,
    )  # fmt: skip


def random_model(config: Blip2Config, device: torch.device, dtype: torch.dtype) -> Any:
    """Weights that keep the multipliers busy: chips clock higher on zeros, which a vision tower initialized as
    configured nearly is.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with device:
        model = Blip2ForConditionalGeneration(config)
    torch.set_default_dtype(before)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02)
    return model.eval()


def word_tokenizer(count: int) -> PreTrainedTokenizerFast:
    """A word for every id, so that captions are text."""
    words = ["<unk>", "<pad>", "</s>", "<mask>", "<image>"] + [f"word{number}" for number in range(count - 5)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def jpegs(count: int, width: int) -> list[bytes]:
    """Pictures of a photograph's size and weight: coarse noise made smooth, with fine noise on it."""
    files = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((width, width * 3 // 4), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = picture + rng.integers(-12, 13, picture.shape, dtype=np.int16)
        stream = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=85)
        files.append(stream.getvalue())
    return files


def flops_per_image(config: Blip2Config, tokens: float) -> dict[str, float]:
    """Multiplications and additions of matrix products, by module."""
    vision, former, text = config.vision_config, config.qformer_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    places, queries = patches + 1, config.num_query_tokens
    width, inner = vision.hidden_size, vision.intermediate_size
    vit = vision.num_hidden_layers * (2 * places * (4 * width**2 + 2 * width * inner) + 4 * places**2 * width)
    vit += 2 * patches * 3 * vision.patch_size**2 * width
    width, inner = former.hidden_size, former.intermediate_size
    own = 2 * queries * (4 * width**2 + 2 * width * inner) + 4 * queries**2 * width
    cross = (
        2 * queries * 2 * width**2 + 2 * places * 2 * former.encoder_hidden_size * width + 4 * queries * places * width
    )
    crossing = -(-former.num_hidden_layers // former.cross_attention_frequency)
    qformer = former.num_hidden_layers * own + crossing * cross + 2 * queries * width * text.hidden_size
    width, inner = text.hidden_size, text.ffn_dim
    layer = 2 * (4 * width**2 + 2 * width * inner)
    prefill = text.num_hidden_layers * (queries * layer + 2 * queries**2 * width)
    step = text.num_hidden_layers * (layer + 4 * (queries + tokens / 2) * width) + 2 * width * text.vocab_size
    return {"ViT": float(vit), "Q-Former": float(qformer), "prefill": float(prefill), "decode": step * tokens}


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product."""
    side, rounds = (8192, 30) if device.type == "cuda" else (512, 5)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    seconds = _timed(device, lambda: [a @ b for _ in range(rounds)])
    return 2 * side**3 * rounds / seconds


class Stopwatch:
    """Time between the start and the end of calls, on the device; nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def around(self, module: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, watched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            result = call(*args, **kwargs)
            self._spans[module].append((start, self._now()))
            return result

        return watched

    def clear(self) -> None:
        """Forget the warm-up."""
        self._spans.clear()

    def seconds(self) -> dict[str, float]:
        """Total of every module."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
            return {name: sum(a.elapsed_time(b) for a, b in spans) / 1e3 for name, spans in self._spans.items()}
        return {name: sum(b - a for a, b in spans) for name, spans in self._spans.items()}

    def _now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def run_engine(
    engine: BlipCaptioner, files: list[bytes], lengths: list[int], threads: int
) -> tuple[float, Stopwatch, float]:
    """Images a second from JPEG bytes to text, the time of each module, and the seconds of the whole."""
    watch = Stopwatch(engine.device)
    tower, qformer = engine._tower, engine.model.qformer
    engine._tower = watch.around("ViT", tower)  # type: ignore[assignment]
    qformer.forward = watch.around("Q-Former", qformer.forward)
    engine._decoder.admit = watch.around("prefill", engine._decoder.admit)  # type: ignore[method-assign]
    slots = engine._slots_for(engine.model.config.num_query_tokens + 1)
    slots._step = watch.around("decode", slots._step)  # type: ignore[method-assign]

    def caption(count: int) -> float:
        with ThreadPoolExecutor(threads) as pool:
            return _timed(
                engine.device,
                lambda: deque(engine.captions(_requests(pool, engine, files, lengths[:count])), maxlen=0),
            )

    caption(min(len(lengths), 3 * engine.batch_size))  # libraries warm up, CUDA graphs are captured
    watch.clear()
    seconds = caption(len(lengths))
    engine._tower = tower
    del qformer.forward  # the class's own again
    return len(lengths) / seconds, watch, seconds


def _requests(
    pool: ThreadPoolExecutor, engine: BlipCaptioner, files: list[bytes], lengths: list[int]
) -> Iterator[Request]:
    """Pictures decoded by threads (Pillow lets go of the interpreter), two batches ahead of the engine."""

    def prepare(row: int) -> Request:
        picture = decode(files[row % len(files)], max_side=engine.spec.draft_side)
        return Request(engine.spec.pixels(picture), f"{row}", max_new_tokens=lengths[row])

    rows = iter(range(len(lengths)))
    ahead = deque(pool.submit(prepare, row) for row in islice(rows, 2 * engine.batch_size))
    while ahead:
        yield ahead.popleft().result()
        ahead.extend(pool.submit(prepare, row) for row in islice(rows, 1))


class Lengths(StoppingCriteria):
    """Each row of a batch ends at its own length."""

    def __init__(self, lengths: list[int], start: int, device: torch.device) -> None:
        self._ends = torch.tensor(lengths, device=device) + start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Rows that are done."""
        return input_ids.shape[1] >= self._ends


def run_plain(
    model: Any, engine: BlipCaptioner, pixels: torch.Tensor, lengths: list[int], batch: int, images: int
) -> float | None:
    """Images a second of `Blip2ForConditionalGeneration.generate` on uint8 pixels in memory; None when they do not
    fit.
    """
    start = model.config.num_query_tokens + 1

    def work(count: int) -> None:
        for first in range(0, count, batch):
            rows = range(first, min(first + batch, count))
            values = engine.normalize(pixels[[row % len(pixels) for row in rows]])
            stop = Lengths([lengths[row] for row in rows], start, engine.device)
            ids = model.generate(pixel_values=values, max_new_tokens=LONGEST, do_sample=False, stopping_criteria=[stop])
            engine.tokenizer.batch_decode(ids, skip_special_tokens=True)

    try:
        work(min(batch, images))
        count = min(images, max(4 * batch, 64))
        return count / _timed(engine.device, lambda: work(count))
    except torch.OutOfMemoryError:
        return None


def run_data_juicer(model: Any, config: Blip2Config, files: list[bytes], lengths: list[int], images: int) -> float:
    """Images a second with what `image_captioning_mapper` 1.6.1 does: its processor, dtype, batch and arguments of
    `generate`.
    """
    model.float()
    size = config.vision_config.image_size
    processor = BlipImageProcessorPil(size={"height": size, "width": size})

    def work(count: int) -> None:
        for first in range(0, count, 8):
            rows = range(first, min(first + 8, count))
            pictures = [Image.open(io.BytesIO(files[row % len(files)])) for row in rows]
            inputs = processor(images=pictures, return_tensors="pt").to(model.device)
            stop = Lengths([lengths[row] for row in rows], config.num_query_tokens + 1, model.device)
            room = min(128, config.text_config.max_position_embeddings - config.num_query_tokens - 1)
            model.generate(**inputs, max_new_tokens=room, do_sample=True, stopping_criteria=[stop])

    work(8)
    return images / _timed(model.device, lambda: work(images))


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
