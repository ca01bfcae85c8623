"""Train what a user of MGM has before alignment: both towers and the language model; projector and uni-modules stay
untrained.

Towers: dense labels (which item, colour, count and word lies in which part of the picture) read by linear heads that
    are thrown away.
The ConvNeXt's heads see what the value module will see: all stages, normalized, averaged over a region.
Language model: text alone. A scene comes as 16 positions, each the sum of the embeddings of the words that describe one
region, before a caption or a conversation about it. That is the interface a projector will have to find from captions
during alignment.

    python -m pipelines.sample.training.mgm --pool /tmp/pool --output pipelines/sample/models/mgm
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, GemmaConfig, PreTrainedTokenizerFast

from pipelines.manifest import read_json, write_json
from pipelines.mgm.configuration import MGMConfig, MGMConvNextConfig
from pipelines.mgm.modeling import MGMForConditionalGeneration
from pipelines.mgm.processing import MGMProcessor
from pipelines.progress import Progress, say
from pipelines.sample.language import SHORT_ANSWER, caption, pick_question
from pipelines.sample.scene import Scene, draw_scenes
from pipelines.sample.training.blip2 import HELD_OUT, normalize
from pipelines.sample.training.pool import ATTRIBUTES, SIDE, Pool, label_table, labels, load_pool
from pipelines.sample.training.tokenizer import gemma_tokenizer

PLACES = 4
TOWER_LABELS = ("item", "color", "count", "text")


def build() -> tuple[MGMForConditionalGeneration, MGMProcessor]:
    """The untrained model and its processor."""
    tokenizer = gemma_tokenizer()
    config = MGMConfig(
        text_config=GemmaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
            pad_token_id=0, eos_token_id=1, bos_token_id=2,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=64,
            patch_size=16
        ),
        vision_config_aux=MGMConvNextConfig(
            hidden_sizes=[32, 64, 128, 192], depths=[1, 1, 3, 2], layer_scale_init_value=0.5, image_size=SIDE
        ),
        image_token_id=tokenizer.vocab["<image>"],
        image_size_aux=SIDE,
    )  # fmt: skip
    model = MGMForConditionalGeneration(config)
    _start_as_copiers(model)
    return model, MGMProcessor.from_config(config, tokenizer, chat_template="gemma")


def _start_as_copiers(model: MGMForConditionalGeneration) -> None:
    """Let every attention layer begin by copying what it attends to, and embeddings by being told apart.

    From the usual initial values a language model of this size sits for thousands of steps on the plateau where it
    knows the grammar and copies nothing from its context; from these it leaves within hundreds.
    """
    language_model = model.model.language_model
    nn.init.normal_(language_model.embed_tokens.weight, std=0.06)
    for layer in language_model.layers:
        attention = layer.self_attn
        nn.init.orthogonal_(attention.v_proj.weight)
        attention.o_proj.weight.data.copy_(attention.v_proj.weight.t())


class TowerHeads(nn.Module):
    """Linear heads on the regions of both towers, and on the 8 x 8 cells of the ConvNeXt for single characters."""

    def __init__(self, clip: int, convnext: int, cells: int) -> None:
        super().__init__()
        sizes = {name: len(ATTRIBUTES[name]) for name in TOWER_LABELS}
        self.clip = nn.ModuleDict({name: nn.Linear(clip, size) for name, size in sizes.items()})
        self.convnext = nn.ModuleDict({name: nn.Linear(convnext, size) for name, size in sizes.items()})
        self.glyph = nn.Linear(cells, len(ATTRIBUTES["glyph"]))


def tower_logits(model: MGMForConditionalGeneration, heads: TowerHeads, pixels: Tensor) -> dict[str, dict[str, Tensor]]:
    """Logits of every head; `pixels` (B, 3, 128, 128) normalized.

    The uni-modules see all stages upscaled to 32 x 32 and normalized. Averaging each stage over the 16 regions first
    gives nearly the same at a third of the cost.
    """
    small = F.interpolate(pixels, size=64, mode="bilinear", align_corners=False)
    tower = model.model.vision_tower_aux
    stages = [tower.embeddings(pixels)]
    for stage in tower.encoder.stages:
        stages.append(stage(stages[-1]))
    pooled = torch.cat([F.adaptive_avg_pool2d(stage, PLACES) for stage in stages[1:]], 1).flatten(2).transpose(1, 2)
    seen = {"clip": model.model.encode_views(small), "convnext": F.layer_norm(pooled, pooled.shape[-1:])}
    found = {name: {label: head(seen[name]) for label, head in getattr(heads, name).items()} for name in seen}
    return found | {"cells": {"glyph": heads.glyph(stages[3].flatten(2).transpose(1, 2))}}


def train_towers(
    model: MGMForConditionalGeneration, pool: Pool, minutes: float, batch: int, peak: float, seed: int
) -> dict:
    """Both towers on dense labels; returns the accuracy of the heads on held-out scenes."""
    rng = np.random.default_rng(seed)
    heads = TowerHeads(128, 416, 128)
    tables = {"coarse": label_table(pool.scenes, PLACES, True), "fine": label_table(pool.scenes, 8, True)}
    towers = [model.model.vision_tower, model.model.vision_tower_aux]
    parameters = [p for module in (*towers, heads) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    held = len(pool.scenes) - HELD_OUT
    for rows, share in batches(rng, held, batch, minutes, optimizer, peak):
        logits = tower_logits(model, heads, normalize(pool.padded[rows]))
        losses = {tower: _tower_loss(found, tables, rows) for tower, found in logits.items()}
        step(optimizer, torch.stack(list(losses.values())).sum(), parameters)
        text = F.cross_entropy(
            logits["convnext"]["text"].flatten(0, 1), torch.from_numpy(tables["coarse"]["text"][rows]).long().flatten()
        )
        share(batch, ", ".join(f"{name} {loss.item():.3f}" for name, loss in {**losses, "text": text}.items()))
    return _tower_accuracy(model, heads, pool, tables["coarse"], np.arange(held, len(pool.scenes)))


def _tower_loss(found: dict[str, Tensor], tables: dict[str, dict[str, np.ndarray]], rows: np.ndarray) -> Tensor:
    total = torch.zeros(())
    for name, logits in found.items():
        table = tables["fine" if name == "glyph" else "coarse"]
        wanted = torch.from_numpy(table[name][rows]).long()
        # Words take longest to learn and matter most.
        total = total + (3 if name == "text" else 1) * F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    return total


@torch.no_grad()
def _tower_accuracy(
    model: MGMForConditionalGeneration, heads: TowerHeads, pool: Pool, table: dict[str, np.ndarray], rows: np.ndarray
) -> dict[str, float]:
    """Share of the labelled regions that the heads get right, per tower and attribute."""
    right: dict[str, list[float]] = {}
    for first in range(0, len(rows), 100):
        part = rows[first : first + 100]
        logits = tower_logits(model, heads, normalize(pool.padded[part]))
        for tower in ("clip", "convnext"):
            for name, found in logits[tower].items():
                wanted = torch.from_numpy(table[name][part])
                there = wanted > 0
                right.setdefault(f"{tower} {name}", []).append(
                    (found.argmax(-1) == wanted)[there].float().mean().item()
                )
    return {name: float(np.mean(values)) for name, values in right.items()}


def batches(
    rng: np.random.Generator, number: int, batch: int, minutes: float, optimizer: torch.optim.Optimizer, peak: float
) -> Iterator:
    """Rows of a batch, until the time is over; sets the learning rate (warm-up, then cosine over the time)."""
    start, count, order = time.time(), 0, np.empty(0, np.int64)
    progress = Progress(None, "train mgm", "samples", every=20)
    while (share := (time.time() - start) / (60 * minutes)) < 1:
        if len(order) < batch:
            order = np.concatenate([order, rng.permutation(number)])
        rows, order = np.sort(order[:batch]), order[batch:]
        count += 1
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, count / 200) * (0.5 + 0.5 * math.cos(math.pi * share))
        yield rows, progress.update
    progress.close()


def step(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: list[nn.Parameter]) -> None:
    """One optimizer step with clipped gradients."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def region_words(scene: Scene, padded: bool) -> list[list[str]]:
    """The words that describe each of the 16 regions of a scene."""
    found = labels(scene, PLACES, padded)
    names = {name: ATTRIBUTES[name] for name in TOWER_LABELS}
    words: list[list[str]] = []
    for place in range(PLACES * PLACES):
        here = " ".join(names[name][found[name][place]] for name in TOWER_LABELS)
        words.append(here.split())
    return words


def documents(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """What follows the 16 positions: prompt (no loss) and continuation, as a caption or as a conversation."""
    if rng.random() < 0.4:
        return "", caption(scene) + "<eos>"
    question = pick_question(scene, rng, reading_share=0.6)
    asked = f"{question.text}\n{SHORT_ANSWER}" if rng.random() < 0.9 else question.text
    return f"\n{asked}<end_of_turn>\n<start_of_turn>model\n", f"{question.answer}<end_of_turn>\n<eos>"


def train_language_model(
    model: MGMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    minutes: float,
    batch: int,
    peak: float,
    seed: int,
) -> dict:
    """The language model on scenes in words; returns the share of held-out answers and captions it gets exactly
    right.
    """
    torch.manual_seed(seed)
    rng, pick = np.random.default_rng(seed), random.Random(seed)
    scenes = draw_scenes("models", 120_000 + HELD_OUT, seed=2)
    ids = {word: tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in _all_words(scenes)}
    bags = [[[i for word in place for i in ids[word]] for place in region_words(scene, True)] for scene in scenes]
    parameters = list(model.model.language_model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    held = len(scenes) - HELD_OUT
    for count, (rows, share) in enumerate(batches(rng, held, batch, minutes, optimizer, peak)):
        samples = [(scenes[i], bags[i]) for i in rows]
        embeds, mask, wanted = _text_batch(model, tokenizer, samples, pick, noise=min(1.0, count / 3000))
        hidden = model.model.language_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        logits = model.lm_head(hidden[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), wanted[:, 1:].flatten(), ignore_index=-100)
        step(optimizer, loss, parameters)
        share(batch, f"loss {loss.item():.3f}")
    return _text_accuracy(model, tokenizer, [(scenes[i], bags[i]) for i in range(held, len(scenes))])


def _all_words(scenes: list[Scene]) -> set[str]:
    return {word for name in TOWER_LABELS for text in ATTRIBUTES[name] for word in text.split()}


def _text_batch(
    model: MGMForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    samples: list[tuple[Scene, list[list[int]]]],
    pick: random.Random,
    noise: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (B, L, D), mask and labels (B, L) of documents with their 16 positions filled in.

    The sums are disturbed (weights, missing words, noise; `noise` from 0 to 1), because no projector will ever hit them
    exactly.
    """
    table = model.model.language_model.embed_tokens.weight
    assert isinstance(table, Tensor)
    start, turn = [2], tokenizer("<start_of_turn>user\n", add_special_tokens=False)["input_ids"]
    rows, wanted, places = [], [], []
    for scene, _ in samples:
        prompt, text = documents(scene, pick)
        head = start + (turn if prompt else [])
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after = tokenizer(text, add_special_tokens=False)["input_ids"]
        rows.append(head + [0] * 16 + before + after)
        wanted.append([-100] * (len(head) + 16 + len(before)) + after)
        places.append(len(head))
    length = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    labels_BL = torch.tensor([row + [-100] * (length - len(row)) for row in wanted])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    embeds = model.model.language_model.embed_tokens(tokens)
    flat = [bag for _, bags in samples for bag in bags]
    counts = torch.tensor([len(bag) for bag in flat])
    members = torch.tensor([i for bag in flat for i in bag])
    weights = torch.ones(len(members))
    if noise:
        weights = (1 + noise * (torch.rand(len(members)) - 0.5)) * (torch.rand(len(members)) > 0.1 * noise)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)[:-1]])
    sums = F.embedding_bag(members, table, offsets, mode="sum", per_sample_weights=weights)
    if noise:
        sums = sums + torch.randn_like(sums) * table.detach().std() * torch.rand(len(sums), 1) * 0.5 * noise
    sums = sums.view(len(samples), 16, -1) * model.model.text_scale
    where = torch.tensor(places)[:, None] + torch.arange(16)
    return embeds.scatter(1, where[..., None].expand(-1, -1, embeds.shape[-1]), sums), mask, labels_BL


@torch.no_grad()
def _text_accuracy(
    model: MGMForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, samples: list[tuple[Scene, list[list[int]]]]
) -> dict[str, float]:
    """Teacher-forced: a document counts when every token of its continuation is the most likely one."""
    pick, right = random.Random(0), []
    for first in range(0, len(samples), 100):
        embeds, mask, wanted = _text_batch(model, tokenizer, samples[first : first + 100], pick, noise=0.0)
        logits = model.lm_head(model.model.language_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state)
        hit = (logits[:, :-1].argmax(-1) == wanted[:, 1:]) | (wanted[:, 1:] == -100)
        right += hit.all(1).tolist()
    return {"documents_exact": float(np.mean(right))}


def main() -> None:
    """Train, score on held-out scenes, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=61_000, help="the last 1,000 are held out")
    parser.add_argument("--tower-minutes", type=float, default=20, help="0 leaves the towers as they are")
    parser.add_argument("--text-minutes", type=float, default=20, help="0 leaves the language model as it is")
    parser.add_argument("--start-from", type=Path, help="continue from an earlier output instead of random weights")
    parser.add_argument(
        "--towers-from", type=Path, help="take the towers of an output that was trained beside this one"
    )
    parser.add_argument(
        "--batch", type=int, default=32, help="small: these models need steps more than they need samples"
    )
    parser.add_argument("--peak", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    model, processor = build()
    result: dict[str, object] = {}
    if args.start_from:
        model = MGMForConditionalGeneration.from_pretrained(args.start_from, dtype=torch.float32)
        result = {"started_from": read_json(args.start_from / "training.json")}
    if args.towers_from:
        other = MGMForConditionalGeneration.from_pretrained(args.towers_from, dtype=torch.float32)
        for tower in ("vision_tower", "vision_tower_aux"):
            getattr(model.model, tower).load_state_dict(getattr(other.model, tower).state_dict())
        result["towers_from"] = read_json(args.towers_from / "training.json")
    parts = {name: sum(p.numel() for p in module.parameters()) for name, module in model.model.named_children()}
    say(json.dumps(parts))
    untrained = {
        name: value.clone() for name, value in model.state_dict().items() if "uni_" in name or "projector" in name
    }
    result["parameters"] = parts
    if args.text_minutes:
        result |= train_language_model(model, processor.tokenizer, args.text_minutes, args.batch, args.peak, args.seed)
        say(json.dumps(result))
    if args.tower_minutes:
        pool = load_pool(args.pool, args.scenes)
        result |= train_towers(model, pool, args.tower_minutes, args.batch, args.peak, args.seed)
    say(json.dumps(result, indent=1))
    # The projector and its modules must be what they were at random: an aligned sample model would prove nothing.
    assert all(torch.equal(model.state_dict()[name], value) for name, value in untrained.items())
    model.eval().save_pretrained(args.output)
    processor.save_pretrained(args.output)
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    write_json(args.output / "training.json", {"settings": settings, "held_out": result})


if __name__ == "__main__":
    main()
