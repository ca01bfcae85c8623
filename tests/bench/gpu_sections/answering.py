"""MGM-2B asked in batches, from JPEG: preparing, prefill, decode steps, and a decode step captured in a graph."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bench_caption_engine_gpu as pictures
import torch
from torch import Tensor
from transformers import AutoProcessor, StaticCache

from pipelines.images import decode
from pipelines.mgm.image_processing import MGMImageProcessor

from .mgm import geometry, random_model
from .run import Run

NEW = 8
SAMPLE = Path(__file__).resolve().parents[3] / "pipelines" / "sample" / "models" / "mgm"


class Answering:
    """The model behind a real tokenizer and template; questions of three lengths about pictures of 1024 pixels."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.processor = AutoProcessor.from_pretrained(SAMPLE)
        text = {} if not run.tiny else _tiny_text(len(self.processor.tokenizer))
        self.config = geometry(run, image_token_id=self.processor.image_token_id, **text)
        self.model = random_model(run, self.config)
        self.model.generation_config.eos_token_id = None  # random weights may end anywhere; answers are full length
        self.processor.image_processor = MGMImageProcessor.from_config(self.config)
        self.processor.num_image_tokens = self.config.num_image_tokens
        self.processor.tokenizer.model_max_length = 4096
        self.files = pictures.jpegs(16, 160 if run.tiny else 1024)
        self.batch = 4 if run.tiny else 32

    def question(self, row: int) -> tuple[str, Any]:
        """Prompt and decoded picture."""
        words = "What is written on the sign? " * (1 + row % 3)
        content = [{"type": "image"}, {"type": "text", "text": words}]
        messages = [{"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return prompt, decode(self.files[row % len(self.files)])

    def prepared(self, rows: range) -> dict[str, Tensor]:
        """Model inputs of so many questions, padded on the left, on the device."""
        prompts, images = zip(*(self.question(row) for row in rows), strict=True)
        inputs = self.processor(text=list(prompts), images=[[each] for each in images], padding=True,
                                return_tensors="pt")  # fmt: skip
        return {
            key: (value.to(self.model.dtype) if value.is_floating_point() else value).to(self.run.device)
            for key, value in inputs.items()
        }

    def generate(self, inputs: dict[str, Tensor], new: int = NEW) -> Tensor:
        """Greedy tokens (B, new)."""
        found = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=new, min_new_tokens=new,
                                    pad_token_id=0)  # fmt: skip
        return found[:, inputs["input_ids"].shape[1] :]

    def rates(self, run: Run) -> None:
        """A batch says what its questions say alone; then questions a second, and where the time goes."""
        inputs = self.prepared(range(self.batch))
        together = self.generate(inputs)
        alone = torch.cat([self.generate(self.prepared(range(row, row + 1))) for row in range(4)])
        run.note("answering.equal", of_alone=float((together[:4] == alone).all(dim=1).float().mean()))
        whole, first = (run.median(lambda new=new: self.generate(inputs, new), 3, 1) for new in (NEW, 1))
        prepare = run.median(lambda: self.prepared(range(self.batch)), 3, 1)
        towers = run.median(
            lambda: self.model.get_image_features(inputs["pixel_values"], inputs["pixel_values_aux"]), 3, 1
        )
        run.note(
            "answering",
            batch=self.batch,
            questions_per_s=self.batch / whole,
            prefill_ms=1e3 * first,
            images_ms=1e3 * towers,
            step_ms=1e3 * (whole - first) / (NEW - 1),
            prepare_ms_one_thread=1e3 * prepare,
            peak_gib=run.peak_gib(),
        )
        self._from_jpeg(run)

    def _from_jpeg(self, run: Run) -> None:
        """Questions a second where threads prepare batches ahead of the model."""
        count = 2 if run.tiny else 8
        for threads in (2, 16):

            def work(threads: int = threads) -> None:
                with ThreadPoolExecutor(threads) as pool:
                    batches = [range(n * self.batch, (n + 1) * self.batch) for n in range(count)]
                    for inputs in pool.map(self.prepared, batches):
                        self.generate(inputs)

            seconds = run.seconds(work)
            run.note("answering.from_jpeg", threads=threads, questions_per_s=count * self.batch / seconds)

    def captured(self, run: Run) -> None:
        """One static cache, a decode step as one graph, its layers compiled or not: the same tokens as `generate`."""
        inputs = self.prepared(range(self.batch))
        wanted = self.generate(inputs)
        for compiled in (False, True):
            if compiled and run.tiny:
                continue
            if compiled and run.left() < 40:
                run.note("answering.captured", compiled=True, skipped=f"{run.left():.0f} s left")
                return
            step = _Step(self.model, inputs)
            if compiled:
                torch._dynamo.reset()
                torch._dynamo.config.recompile_limit = 64  # a layer knows its number, and is compiled for it
                for layer in self.model.model.language_model.layers:
                    layer.compile(dynamic=False)
            work = step.captured() if run.device.type == "cuda" else step
            same = float((step.tokens(work, NEW) == wanted).float().mean())
            step.start()
            seconds = run.median(lambda work=work, step=step: step.many(work, 16), 3, 1) / 16
            run.note("answering.captured", compiled=compiled, step_ms=1e3 * seconds, tokens_of_generate=same)


class _Step:
    """A decode step on static buffers."""

    def __init__(self, model: Any, inputs: dict[str, Tensor]) -> None:
        self._model, mask = model, inputs["attention_mask"]
        rows, self._length = inputs["input_ids"].shape
        total = -(-(self._length + 40) // 64) * 64
        self._cache = StaticCache(config=model.config.get_text_config(), max_cache_len=total)
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        logits = model(**inputs, position_ids=positions, past_key_values=self._cache, use_cache=True,
                       logits_to_keep=1).logits[:, -1]  # fmt: skip
        self._first = logits.argmax(-1, keepdim=True)
        self._after = positions[:, -1:] + 1
        self._token, self._position = self._first.clone(), self._after.clone()
        self._column = torch.full((1,), self._length, device=mask.device)
        self._columns = torch.arange(total, device=mask.device)
        new = mask.new_ones(rows, total - self._length).bool()
        self._real = torch.cat([mask.bool(), new], 1)[:, None, None]

    def __call__(self) -> None:
        seen = self._real & (self._columns <= self._column)[None, None, None]
        out = self._model(input_ids=self._token, attention_mask=seen, position_ids=self._position,
                          past_key_values=self._cache, use_cache=True, logits_to_keep=1)  # fmt: skip
        self._token.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
        self._position.add_(1)
        self._column.add_(1)

    def start(self) -> None:
        """Back to behind the prefill."""
        self._token.copy_(self._first)
        self._position.copy_(self._after)
        self._column.fill_(self._length)
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._length)

    def captured(self) -> Any:
        """The step as a graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self()
        torch.cuda.current_stream().wait_stream(side)
        self.start()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self()
        return graph.replay

    def tokens(self, work: Any, new: int) -> Tensor:
        """(B, new) from the start."""
        self.start()
        found = [self._token.clone()]
        for _ in range(new - 1):
            work()
            found.append(self._token.clone())
        return torch.cat(found, 1)

    def many(self, work: Any, steps: int) -> None:
        """So many steps from the start."""
        self.start()
        for _ in range(steps):
            work()


def _tiny_text(vocabulary: int) -> dict[str, Any]:
    import bench_mgm_gpu

    return {"text_config": bench_mgm_gpu.TINY["text_config"] | {"vocab_size": vocabulary}}


@torch.inference_mode()
def answering(run: Run) -> None:
    """All of it."""
    bench = Answering(run)
    bench.rates(run)
    bench.captured(run)
