"""LoRA on MGM-2B under the memory of a 24 GB card: micro-batches, checkpointing, compiled layers and towers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pipelines.mgm.image_processing import MGMImageProcessor
from pipelines.train.compiling import compile_layers
from pipelines.train.config import PhaseConfig, TrainConfig
from pipelines.train.data import IGNORE, Batch
from pipelines.train.methods import make_learn
from pipelines.train.step import TorchEngine, TrainForward, autocast, prepare

from .mgm import geometry, random_model
from .run import Run, agreement

CAP_GIB = 24


class Training:
    """A model with LoRA and batches of rows as the reference experiment has them: one image, 150 text tokens."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, geometry(run)
        self.text = 20 if run.tiny else 150
        self.model = random_model(run, self.config)
        self.processor = MGMImageProcessor.from_config(self.config)
        self.precision = "float32" if run.tiny else "bf16"
        make_learn(self.model, TrainConfig().phase("instruct"), TrainConfig())
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.01)  # or half of the gradients would be zero

    def batch(self, rows: int, seed: int = 2) -> Batch:
        """So many rows, half of whose text is a target."""
        config, side = self.config, self.config.image_size_aux
        generator = torch.Generator().manual_seed(seed)
        image = torch.full((rows, config.num_image_tokens), config.image_token_id)
        words = torch.randint(3, config.text_config.vocab_size, (rows, self.text), generator=generator)
        ids = torch.cat([words[:, :5], image, words[:, 5:]], 1)
        labels = ids.clone()
        labels[:, : -self.text // 2] = IGNORE
        pixels = torch.randint(0, 256, (rows, 3, side, side), generator=generator, dtype=torch.uint8)
        targets = int((labels[:, 1:] != IGNORE).sum())
        return Batch(ids, torch.ones_like(ids), labels, pixels, None, rows, targets)

    def engine(self) -> TorchEngine:
        """That moves no weight, so that every step sees the same ones."""
        forward = TrainForward(self.model, self.processor.normalize)
        return TorchEngine(forward, PhaseConfig(learning_rate=1e-9), self.precision, self.run.device)

    def checkpointing(self, wanted: bool) -> None:
        """Recompute activations, or keep them."""
        layers = self.model.model.language_model
        new = hasattr(layers, "activation_checkpointing_disable")
        (layers.activation_checkpointing_disable if new else layers.gradient_checkpointing_disable)()
        prepare(self.model, wanted)

    def compile(self, towers: bool) -> list[torch.nn.Module]:
        """As training does, or the decoder layers alone; returns them."""
        torch._dynamo.reset()
        layers = compile_layers(self.model)
        if not towers:
            for layer in layers[len(self.model.model.language_model.layers) :]:
                layer._compiled_call_impl = None
        return layers

    def loss(self, batches: list[Batch]) -> tuple[float, float]:
        """Loss and gradient norm of one step without dropout."""
        drops = [each for each in self.model.modules() if isinstance(each, torch.nn.Dropout)]
        before = [each.p for each in drops]
        for each in drops:
            each.p = 0.0
        found = self.engine().step(batches, 0.0)
        for each, chance in zip(drops, before, strict=True):
            each.p = chance
        return found.loss, found.grad_norm

    def equal(self, run: Run) -> None:
        """One batch of four is four of one."""
        self.checkpointing(True)
        four = self.batch(4)
        ones = [
            Batch(four.input_ids[i : i + 1], four.attention_mask[i : i + 1], four.labels[i : i + 1],
                  four.pixels[i : i + 1], None, 1, four.targets // 4)
            for i in range(4)
        ]  # fmt: skip
        whole, parts = self.loss([four]), self.loss(ones)
        apart = [abs(a - b) / abs(a) for a, b in zip(whole, parts, strict=True)]
        run.note("training.equal", loss=whole[0], loss_apart=apart[0], gradient_apart=apart[1])

    def speed(self, run: Run, rows: int, checkpointing: bool, compiled: str = "") -> None:
        """Samples a second at this micro-batch."""
        facts = {"micro_batch": rows, "checkpointing": checkpointing, "compiled": compiled, "cap_gib": CAP_GIB}
        try:
            self.checkpointing(checkpointing)
            engine, work = self.engine(), [self.batch(rows)]
            warm = run.seconds(lambda: engine.step(work, 0.0))
            engine.step(work, 0.0)
            run.clean()
            seconds = run.median(lambda: engine.step(work, 0.0), 3, 0)
            run.note("training", **facts, samples_per_s=rows / seconds, peak_gib=run.peak_gib(), first_step_s=warm)
        except torch.OutOfMemoryError:
            run.note("training", **facts, out_of_memory=True)

    def compiled(self, run: Run, towers: bool, shapes: tuple[tuple[int, bool], ...]) -> None:
        """The decoder layers compiled, or the towers too: the speed of (rows, checkpointing), and the loss of the first
        of them beside that of plain layers.
        """
        # a compiler at work takes minutes on a CPU
        layers = [] if run.tiny else self.compile(towers)
        for rows, checkpointing in shapes:
            self.speed(run, rows, checkpointing, "layers and towers" if towers else "layers")
        rows, checkpointing = shapes[0]
        self.checkpointing(checkpointing)
        found = self.loss([self.batch(rows)])
        for layer in layers:
            layer._compiled_call_impl = None
        wanted = self.loss([self.batch(rows)])
        apart = [abs(a - b) / abs(a) for a, b in zip(wanted, found, strict=True)]
        run.note("training.compiled.equal", towers=towers, loss_apart=apart[0], gradient_apart=apart[1])
        assert math.isfinite(found[0])

    def plain(self, run: Run) -> None:
        """What one writes first: a row at a time through `forward(labels=...)`, checkpointing, AdamW."""
        self.checkpointing(True)
        learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer, rows = torch.optim.AdamW(learned, lr=0.0), 2 if run.tiny else 8
        batches = [self.batch(1, seed).to(run.device) for seed in range(rows)]

        def step() -> None:
            for batch in batches:
                pixels, aux = self.processor.normalize(batch.pixels)
                with autocast(run.device, self.precision)():
                    loss = self.model(
                        input_ids=batch.input_ids,
                        attention_mask=batch.attention_mask,
                        pixel_values=pixels,
                        pixel_values_aux=aux,
                        labels=batch.labels,
                    ).loss
                (loss / rows).backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        seconds = run.median(step, 3, 1)
        run.note(
            "training.plain", micro_batch=1, cap_gib=CAP_GIB, samples_per_s=rows / seconds, peak_gib=run.peak_gib()
        )

    def towers(self, run: Run) -> None:
        """What the frozen towers take of it."""
        rows = 2 if run.tiny else 8
        side = self.config.image_size_aux
        pixels = torch.randint(0, 256, (rows, 3, side, side), dtype=torch.uint8, device=run.device)
        views, aux = self.processor.normalize(pixels)
        for name, call, given in (
            ("CLIP", self.model.model.encode_views, views),
            ("ConvNeXt", self.model.model.vision_tower_aux, aux),
        ):
            run.note(f"training.tower {name}", ms_per_image=1e3 * run.median(self._frozen(call, given)) / rows)
            if name == "ConvNeXt":
                wanted = self._frozen(call, given)()
                self.model.model.vision_tower_aux.to(memory_format=torch.channels_last)
                last = given.contiguous(memory_format=torch.channels_last)
                got = self._frozen(call, last)()
                seconds = run.median(self._frozen(call, last))
                run.note("training.tower ConvNeXt, channels_last", ms_per_image=1e3 * seconds / rows,
                         **agreement(got, wanted))  # fmt: skip

    def _frozen(self, call: Callable[[Any], Any], given: Any) -> Callable[[], Any]:
        def work() -> Any:
            with torch.no_grad(), autocast(self.run.device, self.precision)():
                return call(given)

        return work


def cap(on: bool) -> None:
    """Let torch have the memory of a 24 GB card only."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_GIB * 2**30 / total) if on else 1.0)


def training(run: Run) -> None:
    """All of it, most valuable first; each part may run out of the capped memory for itself."""
    cap(True)
    bench = Training(run)
    run.section("training.equal", 10, bench.equal)
    for rows, checkpointing in ((2, True), (1, False)) if run.tiny else ((8, True), (1, True), (2, False)):
        run.section("training", 10, partial(bench.speed, rows=rows, checkpointing=checkpointing))
    run.section("training.plain", 15, bench.plain)
    both = ((2, True),) if run.tiny else ((8, True), (16, True), (4, False), (8, False))
    run.section("training.compiled", 90, partial(bench.compiled, towers=True, shapes=both))
    run.section("training.compiled", 45, partial(bench.compiled, towers=False, shapes=both[:1]))
    cap(False)
    run.section("training.towers", 10, bench.towers)
