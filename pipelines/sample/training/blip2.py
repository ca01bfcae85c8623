"""Train the sample BLIP-2: a genuine ViT + Q-Former + OPT of about two million parameters that describes scenes and
reads their words.

Caption loss alone learns colours fast and reading hardly at all at this size, so the ViT also gets dense labels: at
every patch, which character stands there, which item, which colour and which word it belongs to. The heads are thrown
away afterwards.

    python -m pipelines.sample.training.blip2 --pool /tmp/pool --output pipelines/sample/models/blip2
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessorPil

from pipelines.manifest import write_json
from pipelines.progress import Progress, say
from pipelines.sample.training.pool import ATTRIBUTES, CLIP_MEAN, CLIP_STD, SIDE, Pool, label_table, load_pool
from pipelines.sample.training.tokenizer import opt_tokenizer

QUERIES, PATCH, HELD_OUT = 12, 16, 1000
WARM_UP = 0.25
"""Share of the time in which the ViT learns from dense labels alone."""
PLACES = SIDE // PATCH


def build() -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """The untrained model and its processor."""
    tokenizer = opt_tokenizer()
    config = Blip2Config(
        vision_config=dict(
            hidden_size=160, intermediate_size=480, num_hidden_layers=5, num_attention_heads=5, image_size=SIDE,
            patch_size=PATCH
        ),
        qformer_config=dict(
            hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
            cross_attention_frequency=1,
            encoder_hidden_size=160, vocab_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        text_config=dict(
            model_type="opt", hidden_size=128, word_embed_proj_dim=128, ffn_dim=384, num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=128, vocab_size=len(tokenizer), dropout=0.0, bos_token_id=2, eos_token_id=2,
            pad_token_id=1,
        ),
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.vocab["<image>"],
    )  # fmt: skip
    images = BlipImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, image_mean=list(CLIP_MEAN), image_std=list(CLIP_STD)
    )
    model = Blip2ForConditionalGeneration(config)
    model.vision_model.embeddings.position_embedding.data[0, 1:] = grid_positions(PLACES, 160)
    return model, Blip2Processor(images, tokenizer, num_query_tokens=QUERIES)


def grid_positions(places: int, width: int) -> Tensor:
    """(places * places, width) sines and cosines of row and column (as MAE's, He et al. 2021, arXiv:2111.06377).

    Letters become words by looking at the neighbours; from these positions "one to the left" is a rotation that
    attention learns in minutes, from small random ones it is not learned in an hour.
    """
    frequencies = torch.exp(torch.linspace(0, -math.log(20.0), width // 4))
    angles = torch.arange(places)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], 1)
    row, column = line[:, None].expand(-1, places, -1), line[None].expand(places, -1, -1)
    return 0.5 * torch.cat([row, column], -1).reshape(places * places, width)


def normalize(pixels: np.ndarray) -> Tensor:
    """uint8 (B, 3, H, W) to the float32 that CLIP-style models see."""
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) * 255 for value in (CLIP_MEAN, CLIP_STD))
    return (torch.from_numpy(np.ascontiguousarray(pixels)).float() - mean) / std


class PatchHeads(nn.Module):
    """Linear probes on the ViT's last hidden state; the letter is asked for halfway up, the rest at the top."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(classes)) for name, classes in ATTRIBUTES.items()})

    def losses(self, middle: Tensor, top: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy per attribute; `middle` and `top` are hidden states (B, 1 + 64, width)."""
        found = {name: head((middle if name == "glyph" else top)[:, 1:]) for name, head in self.heads.items()}
        return {name: F.cross_entropy(logits.flatten(0, 1), wanted[name].flatten()) for name, logits in found.items()}


def train(
    pool: Pool, minutes: float, batch: int, peak: float, seed: int
) -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    """Train for `minutes`; first the ViT on dense labels alone, then captions join."""
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)  # gradients of the first steps are denormal: a hundred times slower on most CPUs
    rng = np.random.default_rng(seed)
    model, processor = build()
    tokens = processor.tokenizer(pool.captions, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    eos = torch.full((len(tokens), 1), 1)
    tokens = torch.cat([tokens, eos], 1)
    lengths = (tokens != 1).sum(1)
    tokens[torch.arange(len(tokens)), lengths] = 2
    table = label_table(pool.scenes, PLACES, padded=False)
    heads = PatchHeads(160)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} scenes")
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *heads.parameters()], lr=peak, betas=(0.9, 0.98), weight_decay=0.05
    )
    held = len(pool.scenes) - HELD_OUT
    start, step, order = time.time(), 0, np.empty(0, np.int64)
    progress, last = Progress(None, "train blip2", "scenes", every=20), 0.0
    model.train()
    while (share := (time.time() - start) / (60 * minutes)) < 1:
        if len(order) < batch:
            order = np.concatenate([order, rng.permutation(held)])
        rows, order = np.sort(order[:batch]), order[batch:]
        rate = peak * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * share) if share < 1 else 0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        wanted = {name: torch.from_numpy(values[rows]).long() for name, values in table.items()}
        pixels = normalize(pool.stretched[rows])
        words = torch.zeros(())
        if share < WARM_UP:
            seen = model.vision_model(pixels, output_hidden_states=True)
        else:
            words, seen = caption_loss(model, pixels, tokens[rows])
        dense = heads.losses(seen.hidden_states[2], seen.last_hidden_state, wanted)
        loss = words + (1.0 if share < WARM_UP else 0.5) * sum(dense.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        losses = ", ".join(f"{name} {value.item():.3f}" for name, value in {"caption": words, **dense}.items())
        progress.update(batch, f"{share:.0%} of the time, {losses}")
        if time.time() - last > 240:
            last = time.time()
            say(json.dumps(score(model, processor, pool, range(held, held + 200)))[:400])
    return model, processor


def caption_loss(model: Blip2ForConditionalGeneration, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, nn.Module]:
    """Cross-entropy of the caption tokens after the image; also the ViT's outputs, so that they are computed once."""
    seen = model.vision_model(pixels, output_hidden_states=True)
    queries = model.query_tokens.expand(len(pixels), -1, -1)
    read = model.qformer(query_embeds=queries, encoder_hidden_states=seen.last_hidden_state).last_hidden_state
    prefix = model.language_projection(read)
    embeds = torch.cat([prefix, model.get_input_embeddings()(tokens[:, :-1]).to(prefix.dtype)], 1)
    mask = torch.cat([torch.ones(len(tokens), QUERIES, dtype=torch.long), (tokens[:, :-1] != 1).long()], 1)
    logits = model.language_model(inputs_embeds=embeds, attention_mask=mask).logits[:, QUERIES:]
    loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=1)
    return loss, seen


@torch.no_grad()
def score(
    model: Blip2ForConditionalGeneration, processor: Blip2Processor, pool: Pool, rows: range
) -> dict[str, object]:
    """Exact captions and words read, on scenes that were not trained on, through the ordinary `generate`."""
    model.eval()
    said: list[str] = []
    for first in range(rows.start, rows.stop, 100):
        part = np.arange(first, min(first + 100, rows.stop))
        ids = model.generate(pixel_values=normalize(pool.stretched[part]), max_new_tokens=24, do_sample=False)
        said += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    model.train()
    wanted = [pool.captions[i] for i in rows]
    written = [[item.text for item in pool.scenes[i].writings] for i in rows]
    pairs = list(zip(said, written, strict=True))
    return {
        "scenes": len(said),
        "exact": sum(a == b for a, b in zip(said, wanted, strict=True)) / len(said),
        "writings_read": sum(t in s.split() for s, ts in pairs for t in ts) / sum(len(ts) for _, ts in pairs),
        "examples": [f"{a} | {b}" for a, b in list(zip(said, wanted, strict=True))[:3]],
    }


def main() -> None:
    """Train, score on held-out scenes, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=61_000, help="the last 1,000 are held out")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--peak", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pool = load_pool(args.pool, args.scenes)
    model, processor = train(pool, args.minutes, args.batch, args.peak, args.seed)
    held = len(pool.scenes) - HELD_OUT
    result = score(model, processor, pool, range(held, held + HELD_OUT))
    say(json.dumps(result, indent=1))
    assert model.generation_config is not None
    model.generation_config.max_new_tokens = 24
    model.eval()
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    settings = {key: value for key, value in vars(args).items() if not isinstance(value, Path)}
    write_json(args.output / "training.json", {"settings": settings, "held_out": result})


if __name__ == "__main__":
    main()
