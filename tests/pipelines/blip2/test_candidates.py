"""Each way to choose picks what it promises, and says by what score."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.blip2.candidates import Chooser, Generated, simhash
from pipelines.blip2.config import CHOICES, CandidateConfig, DecodingConfig
from pipelines.blip2.engine import BlipCaptioner
from pipelines.caption.config import CaptionConfig
from pipelines.errors import UserError

PIXELS = np.zeros((3, 32, 32), np.uint8)


def choose(
    mode: str, texts: list[str], original: str | None = None, **changes: object
) -> tuple[list[float] | None, str]:
    ended = changes.pop("ended", [True] * len(texts))
    image = Generated(str(changes.pop("sample_id", "id")), texts, ended, original, PIXELS)  # type: ignore[arg-type]
    config = CandidateConfig(count=len(texts), choose=mode, **changes)  # type: ignore[arg-type]
    return Chooser(config, 0, torch.device("cpu")).choose([image])[0]


def test_simhash_is_data_juicers() -> None:
    """Values of simhash-pybind 0.0.3 under Data-Juicer's settings: lower case, pairs of words, split at spaces
    alone.
    """
    assert simhash("a red sign that says open") == 6631785017439516930
    assert simhash("Two  blue circles LEFT of a green square ") == 7664841563372085998
    assert simhash("word") == simhash("") == 0


def test_data_juicers_choices() -> None:
    """The candidate most like the caption as found; all of them; any of them, the same one for the same sample."""
    texts = ["a man in a hat", "a red sign that says open", "a red sign that says shut"]
    scores, chosen = choose("similar_one_simhash", texts, "a big red sign that says shut")
    assert chosen == texts[2] and scores is not None and scores[2] == max(scores) and max(scores) <= 1
    assert choose("similar_one_simhash", texts, None)[1] in texts
    assert choose("all", texts) == (None, texts[0])  # all of them are candidates, of which refining makes a row each
    picked = Counter(choose("random_any", texts, sample_id=str(i))[1] for i in range(300))
    assert set(picked) == set(texts) and min(picked.values()) > 60
    assert choose("random_any", texts, sample_id="7") == choose("random_any", texts, sample_id="7")
    assert choose("first", texts) == (None, texts[0])


def test_longest_clean_leaves_broken_captions_out() -> None:
    """Loops, stutters, cut-off captions and junk lose to a shorter clean one; when nothing is clean, the least broken
    stays.
    """
    clean = "a red sign on a door"
    broken = [
        "a dog and a dog and a dog and a dog and a dog",
        "a very very long red sign on a big wooden door",
        "a red sign <pad> on a big old wooden door",
        "",
    ]
    scores, chosen = choose("longest_clean", [*broken, clean, "a sign"])
    assert chosen == clean and scores is not None and scores[-2:] == [6, 2] and max(scores[:4]) < 0
    cut = "a red sign on the door of a shop that sells"
    assert choose("longest_clean", [cut, clean], ended=[False, True])[1] == clean
    assert choose("longest_clean", broken[:2])[1] == broken[1]


def test_most_informative_counts_what_is_said() -> None:
    """Different content words; function words and repetition add nothing, and words that other candidates use break a
    tie.
    """
    texts = ["there is a sign and it is on the wall", "red sign white letters brick wall", "a sign a sign a sign"]
    scores, chosen = choose("most_informative", texts)
    assert chosen == texts[1] and scores is not None and [int(score) for score in scores] == [2, 6, 1]
    assert choose("most_informative", ["a purple cow", "a red sign", "red sign here"])[1] == "a red sign"


@pytest.fixture(scope="module")
def clip(blip2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A genuine, tiny, random CLIP with the words of the tiny BLIP-2."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    directory = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(blip2, padding_side="right")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    text = small | dict(
        vocab_size=len(tokenizer), max_position_embeddings=16, bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    vision = small | dict(image_size=32, patch_size=8)
    torch.manual_seed(4)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(directory)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(directory)
    return directory


def test_clip_scores_each_caption_against_its_own_image(clip: Path) -> None:
    """Images and captions in one batch, texts longer than CLIP's limit among them: CLIP's own cosines, one pair at a
    time.
    """
    from transformers import CLIPModel, CLIPProcessor

    rng = np.random.default_rng(0)
    texts = ["a red sign", "two blue circles", "a green square left of a red sign that says open " * 3]
    images = [
        Generated(str(i), texts[i:], [True] * 3, None, rng.integers(0, 256, (3, 32, 32), np.uint8)) for i in range(2)
    ]
    config = CandidateConfig(count=3, choose="clip_best", clip_model=str(clip))
    found = Chooser(config, 0, torch.device("cpu")).choose(images)
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    for image, (scores, chosen) in zip(images, found, strict=True):
        assert scores is not None and len(set(scores)) == len(image.texts)
        for text, score in zip(image.texts, scores, strict=True):
            inputs = processor(
                text=[text],
                images=[image.pixels.transpose(1, 2, 0)],
                truncation=True,
                max_length=16,
                return_tensors="pt",
            )
            with torch.no_grad():
                cosine = model(**inputs).logits_per_image[0, 0] / model.logit_scale.exp()
            assert abs(score - float(cosine)) < 1e-5
        assert chosen == image.texts[int(np.argmax(scores))]
    with pytest.raises(UserError, match=r"caption\.candidates\.clip_model"):
        Chooser(CandidateConfig(count=2, choose="clip_best", clip_model="/nowhere"), 0, torch.device("cpu"))


def test_a_clip_with_holes_is_refused(clip: Path, blip2: Path, tmp_path: Path) -> None:
    """Scores by weights that transformers made up would look like any others."""
    holed = Path(shutil.copytree(clip, tmp_path / "holed"))
    weights = load_file(holed / "model.safetensors")
    weights.pop("text_model.final_layer_norm.weight")
    save_file(weights, holed / "model.safetensors", {"format": "pt"})
    for directory, message in ((holed, "1 missing: text_model.final_layer_norm.weight"), (blip2, "not 'clip'")):
        with pytest.raises(UserError, match=message):
            Chooser(CandidateConfig(count=2, choose="clip_best", clip_model=str(directory)), 0, torch.device("cpu"))


@pytest.mark.parametrize("mode", CHOICES)
def test_every_choice_goes_through_the_engine(ending: Path, clip: Path, mode: str) -> None:
    """Candidates, scores and the chosen one are all there, whatever the mode, and do not depend on the batch."""
    model = str(clip) if mode == "clip_best" else ""
    config = CaptionConfig(
        max_new_tokens=8,
        batch_size=8,
        decoding=DecodingConfig(method="sample"),
        candidates=CandidateConfig(count=3, choose=mode, clip_model=model),
    )
    engine = BlipCaptioner(ending, config)
    pixels = np.random.default_rng(5).integers(0, 256, (9, 3, 32, 32), dtype=np.uint8)
    ids, originals = [f"id{i}" for i in range(9)], ["a red sign that says open"] * 9
    rows = engine.caption(pixels, ids, originals=originals)
    measured = mode in ("similar_one_simhash", "clip_best", "longest_clean", "most_informative")
    for row in rows:
        assert len(row.candidates) == 3 and row.error is None
        assert (row.scores is not None) == measured
        if row.scores is not None:
            assert row.chosen == row.candidates[int(np.argmax(row.scores))]
        else:
            assert row.chosen in ([*row.candidates, "\n".join(row.candidates)])
    assert engine.caption(pixels[4:6], ids[4:6], originals=originals[4:6])[0].chosen == rows[4].chosen
