"""BLIP-2 OPT-2.7B at its true geometry, random weights: the engine from pixels, against transformers' `generate`."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import bench_caption_engine_gpu as bench
import numpy as np
import torch
from torch import Tensor

from pipelines.blip2.config import BlipConfig
from pipelines.blip2.engine import BlipCaptioner, Request
from pipelines.blip2.pixels import spec_from_config
from pipelines.blip2.slots import Job, Prefix
from pipelines.images import decode

from .run import Run, agreement

FIXED, SHORTEST, LONGEST = 16, 12, 20
FP8 = {"products": "fp8", "dtype": "bfloat16"}


class Captions:
    """The model, and pixels for it."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, bench.geometry(run.tiny)
        self.model = bench.random_model(self.config, run.device, run.dtype)
        self.tokenizer = bench.word_tokenizer(self.config.text_config.vocab_size)
        side = self.config.vision_config.image_size
        self.spec = spec_from_config({"size": {"height": side, "width": side}}, "bench")
        files = bench.jpegs(64, 160 if run.tiny else 640)
        self.pictures = [self.spec.pixels(decode(data, max_side=self.spec.draft_side)) for data in files]
        self.images, self.slots = (48, 16) if run.tiny else (3072, 256)

    @cached_property
    def many(self) -> Tensor:
        """uint8 (slots, 3, H, W): as many different pictures as there are slots."""
        turned = [np.rot90(each, turns, (1, 2)) for turns in range(4) for each in self.pictures]
        return torch.from_numpy(np.stack(turned[: self.slots]))

    def engine(self, slots: int, longest: int = LONGEST, **options: Any) -> BlipCaptioner:
        """With so many slots; captions end at their limits only."""
        config = BlipConfig(batch_size=slots, max_new_tokens=longest, **options)
        engine = BlipCaptioner.of(self.model, self.tokenizer, self.spec, config)
        assert engine._ends == []
        return engine

    def drop(self, engine: BlipCaptioner) -> None:
        """Give its memory back."""
        engine._slots = None
        engine._decoder.release()
        self.run.clean()

    def requests(self, lengths: list[int]) -> Iterator[Request]:
        """An image for each length."""
        for row, length in enumerate(lengths):
            yield Request(self.pictures[row % len(self.pictures)], str(row), max_new_tokens=length)

    def lengths(self, count: int, mixed: bool) -> list[int]:
        """Tokens of each caption."""
        return [random.Random(row).randint(SHORTEST, LONGEST) if mixed else FIXED for row in range(count)]

    @torch.inference_mode()
    def equal(self, run: Run) -> None:
        """Tokens against `generate`'s; features and first logits against float32, beside transformers' own distance."""
        count = 16
        engine = self.engine(8 if run.tiny else 64)
        pixels = self.many[:count]
        values = engine.normalize(pixels)
        start = self.config.num_query_tokens + 1
        wanted = self.model.generate(pixel_values=values, max_new_tokens=FIXED, do_sample=False)[:, start:].tolist()
        requests = [Request(each, max_new_tokens=FIXED) for each in pixels.numpy()]
        graphs = [tokens[0] for tokens in engine.generate(requests)]
        assert engine._slots is not None
        engine._slots._step = engine._slots._advance
        eager = [tokens[0] for tokens in engine.generate(requests)]
        run.note(
            "captions.equal",
            of_generate=_share(graphs, wanted),
            first_tokens_of_generate=sum(a[0] == b[0] for a, b in zip(graphs, wanted, strict=True)) / count,
            graphs_of_eager=_share(graphs, eager),
        )
        exact = copy.deepcopy(self.model.vision_model).float()
        states = exact(pixel_values=values.float()).last_hidden_state
        theirs = self.model.vision_model(pixel_values=values).last_hidden_state
        run.note(
            "captions.equal.tower", engine=agreement(engine._tower(values), states), theirs=agreement(theirs, states)
        )
        del exact
        self._equal_steps(run, engine)
        self.drop(engine)

    def _equal_steps(self, run: Run, engine: BlipCaptioner) -> None:
        """Logits of prefixes and three steps on given tokens, against transformers in float32 and in 16 bits."""
        engine._decoder.allocate(8, 48, 8)
        model, features = self.model.language_model, engine.features(self.many[:8])
        tokens = torch.arange(8 * 4, device=run.device).view(8, 4) % 300 + 5
        engine._decoder.admit(features, [], *(torch.arange(8, device=run.device) for _ in range(2)))
        places = torch.full((8,), features.shape[1], device=run.device)
        steps = [engine._decoder.step(tokens[:, n], places + n, 48) for n in range(4)]
        whole = torch.cat([features, model.get_input_embeddings()(tokens)], dim=1)
        theirs = model(inputs_embeds=whole).logits[:, -4:]
        exact = copy.deepcopy(model).float()
        wanted = exact(inputs_embeds=whole.float()).logits[:, -4:]
        run.note(
            "captions.equal.logits",
            engine=agreement(torch.stack(steps, 1), wanted),
            theirs=agreement(theirs, wanted),
        )

    @torch.inference_mode()
    def rate(self, run: Run, slots: int, mixed: bool, name: str = "captions.engine", **options: Any) -> float:
        """Images a second from pixels to text, after a warm-up that captures what there is to capture."""
        engine = self.engine(slots, **options)
        lengths = self.lengths(self.images, mixed)
        deque(engine.captions(self.requests(lengths[: 2 * slots + slots // 2])), maxlen=0)
        run.clean()
        seconds = run.seconds(lambda: deque(engine.captions(self.requests(lengths)), maxlen=0))
        flops = sum(bench.flops_per_image(self.config, sum(lengths) / len(lengths)).values())
        rate = len(lengths) / seconds
        run.note(
            name,
            slots=slots,
            tokens="12 to 20" if mixed else FIXED,
            images_per_s=rate,
            of_peak=rate * flops / run.peak_flops,
            peak_gib=run.peak_gib(),
            **options,
        )
        self.drop(engine)
        return rate

    @torch.inference_mode()
    def plain(self, run: Run, batch: int, mixed: bool) -> None:
        """transformers' `generate` on the same pixels and lengths."""
        engine, lengths = self.engine(8), self.lengths(self.images // 2, mixed)
        start = self.config.num_query_tokens + 1

        def work(count: int) -> None:
            for first in range(0, count, batch):
                rows = range(first, min(first + batch, count))
                pixels = torch.from_numpy(np.stack([self.pictures[row % len(self.pictures)] for row in rows]))
                stop = bench.Lengths([lengths[row] for row in rows], start, run.device)
                found = self.model.generate(
                    pixel_values=engine.normalize(pixels), max_new_tokens=LONGEST, do_sample=False,
                    stopping_criteria=[stop],
                )  # fmt: skip
                self.tokenizer.batch_decode(found, skip_special_tokens=True)

        work(batch)
        seconds = run.seconds(lambda: work(len(lengths)))
        run.note(
            "captions.generate",
            batch=batch,
            tokens="12 to 20" if mixed else FIXED,
            images_per_s=len(lengths) / seconds,
        )

    @torch.inference_mode()
    def parts(self, run: Run, **options: Any) -> None:
        """Kernels of tower, prefill and decode step; `options` are the engine's."""
        engine, slots = self.engine(self.slots, FIXED, **options), self.slots
        kind = ".fp8" if options else ""
        deque(engine.captions(self.requests(self.lengths(2 * slots, False))), maxlen=0)
        values = engine.normalize(self.many)
        run.kernels(f"captions.tower{kind} of {slots}", lambda: engine._tower(values))
        features = engine.features(self.many)
        prompt = engine._prompt_ids([""])[0]
        prefixes = [Prefix(row, str(row), image, prompt, FIXED) for row, image in enumerate(features)]
        state = engine._slots
        assert state is not None
        for count in (slots // 4, slots):
            jobs, where = [Job(prefix, 0) for prefix in prefixes[:count]], np.arange(count)
            run.kernels(f"captions.prefill{kind} of {count}", lambda jobs=jobs, where=where: state._admit(jobs, where))
        length = 16 * -(-(len(features[0]) + FIXED) // 16)
        run.kernels(f"captions.step{kind} of {slots}", lambda: [state._step(slots, length) for _ in range(8)], 8)
        self.drop(engine)

    @torch.inference_mode()
    def fp8(self, run: Run) -> None:
        """How far float8 leads from 16 bits, then how fast it is."""
        self.model.to(torch.bfloat16)  # a tiny one was not
        engine, plain = self.engine(8, **FP8), self.engine(8, dtype="bfloat16")
        pixels = self.many[:16]
        got, wanted = engine.features(pixels), plain.features(pixels)
        requests = [Request(each, max_new_tokens=FIXED) for each in pixels.numpy()]
        mine, theirs = ([tokens[0] for tokens in each.generate(requests)] for each in (engine, plain))
        run.note("captions.fp8.agreement", features=agreement(got, wanted), tokens=_share(mine, theirs))
        self.drop(engine), self.drop(plain)
        self.rate(run, self.slots, False, "captions.fp8", **FP8)
        self.rate(run, 2 * self.slots, False, "captions.fp8", **FP8)


def _share(got: list[list[int]], wanted: list[list[int]]) -> float:
    """Of captions that are the same, token for token."""
    return sum(a == b for a, b in zip(got, wanted, strict=True)) / len(wanted)
