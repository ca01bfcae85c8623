from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.errors import UserError
from pipelines.formats import llava
from pipelines.formats.export import export
from pipelines.manifest import MANIFEST
from pipelines.mgm.load import load_model, load_processor
from pipelines.mgm.templates import ALIGNMENT, CHAT_TEMPLATES
from pipelines.train import features
from pipelines.train.data import IGNORE, Loader, Sampler, Share, Templates, prefetch
from pipelines.train.rows import read_rows
from tests.tiny_tokenizers import tokenizer_for

from ..mgm.conftest import load_masks


def _target_text(batch: Any, tokenizer: Any, row: int) -> str:
    return str(tokenizer.decode(batch.labels[row][batch.labels[row] != IGNORE]))


def test_align_learns_the_caption_and_its_end_after_the_image(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """Gemma is aligned in its conversation, a request for a description first; image and request carry no loss."""
    loader = tiny.loader(model_dir, tiny.write_dataset(tmp_path / "data"), "align")
    batch = loader.step(0)[0]
    tokenizer = tiny.tokenizer()
    text = _target_text(batch, tokenizer, 0)
    assert text.startswith("a square of the colour") and text.endswith(".<end_of_turn>\n<eos>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert (batch.input_ids == image).sum(1).tolist() == [16] * 4
    assert llava.REQUEST.replace("<image>", "<image>" * 16) in tokenizer.decode(batch.input_ids[0])
    assert batch.pixels.shape == (4, 3, 64, 64) and batch.pixels.dtype == torch.uint8
    assert batch.targets == int((batch.labels != IGNORE).sum())


def test_a_recipe_may_name_another_template(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """`plain`: BOS, the image, the caption and a line feed, nothing else."""
    loader = tiny.loader(model_dir, tiny.write_dataset(tmp_path / "data"), "align", template="plain")
    batch, tokenizer = loader.step(0)[0], tiny.tokenizer()
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert batch.input_ids[0, :17].tolist() == [tokenizer.bos_token_id, *[image] * 16]
    assert _target_text(batch, tokenizer, 0).endswith(".\n")


def _processor(kind: str) -> Any:
    tokenizer = tokenizer_for(kind)
    return SimpleNamespace(
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATES[kind.split("-")[0]],
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        num_image_tokens=1,
    )


@pytest.mark.parametrize(
    "kind", ["gemma", "vicuna_v1", "vicuna_v1-legacy", "llama_3", "mistral_instruct", "chatml_direct", "plain"]
)
def test_the_recorded_masks_come_out_of_the_loader(kind: str, tiny: Any, tmp_path: Path) -> None:
    """Every conversation that the original's `preprocess_*` functions were recorded on, from a LLaVA file to the batch:
    the original's tokens and labels. Those that it gives no loss are named as broken.
    """
    processor, image = _processor(kind), tmp_path / "a.jpg"
    image.write_bytes(tiny.jpeg("red"))
    compared = 0
    for case in (case for case in load_masks() if case["template"] == kind):
        limit = case.get("max_length", 2048)
        placeholders = sum(turn["value"].count("<image>") for turn in case["conversation"])
        entry = {"conversations": case["conversation"], "image": [image.name] * placeholders}
        (tmp_path / "rows.json").write_text(json.dumps([entry]))
        rows = read_rows(tmp_path / "rows.json")
        templates = Templates(processor, limit)
        encode = templates.align if kind == "plain" else templates.instruct
        share = Share(0, 1, micro_batch=1, accumulation=1)
        loader = Loader(rows, encode, lambda images: torch.zeros(len(images), 3, 8, 8), Sampler(1, 0, "x"), share, 0)
        labels = [IGNORE if label == -200 else label for label in case["labels"]]
        if all(label == IGNORE for label in labels[1:]):
            with pytest.raises(UserError, match="no row to train on"):
                rows.require_usable()
                loader.step(0)
            continue
        batch = loader.step(0)[0]
        ids = [processor.image_token_id if token == -200 else token for token in case["input_ids"]]
        assert batch.input_ids[0].tolist() == ids and batch.labels[0].tolist() == labels, case["case"]
        compared += 1
    assert compared >= (2 if kind == "plain" else 9)


@pytest.mark.parametrize("family", sorted(ALIGNMENT))
def test_each_language_model_is_aligned_as_its_original_script_does(family: str) -> None:
    """Gemma and Llama 3 in their conversations, Vicuna, Mixtral and Yi plainly; the model's chat template decides."""
    names = Templates(_processor(family), 2048).names
    conversations = ("gemma", "llama_3")
    assert names == {"align": family if family in conversations else "plain", "instruct": family}


def test_a_chat_template_of_no_family_must_be_named(tiny: Any, model_dir: Path) -> None:
    """Training in one form and being asked in another would only show in the scores."""
    processor = load_processor(model_dir)
    processor.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match=r"train\.align\.template: .* none of the original's"):
        Templates(processor, 128)
    assert Templates(processor, 128, "plain", "gemma").names == {"align": "plain", "instruct": "gemma"}


def test_instruct_learns_the_answers_only(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """Two turns and a text-only row: the loss sees each answer with the end of its turn, and nothing of the
    questions.
    """
    tiny.write_instructions(tmp_path / "instruct.json", rows=1, text_only=1)
    entries = json.loads((tmp_path / "instruct.json").read_text())
    entries[0]["conversations"] += [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "the square"}]
    (tmp_path / "instruct.json").write_text(json.dumps(entries))
    loader = tiny.loader(model_dir, tmp_path / "instruct.json", "instruct", micro_batch=2)
    batch = loader.step(0)[0]
    texts = sorted(_target_text(batch, tiny.tokenizer(), row) for row in (0, 1))
    assert texts == ["a square.<end_of_turn>\n<eos>", "red<end_of_turn>\n<eos>the square<end_of_turn>\n<eos>"]
    assert len(batch.pixels) == 1


def test_broken_rows_are_named_and_replaced(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """An image that does not decode costs no sample of the step, and is in the list of broken rows with its reason."""
    loader = tiny.loader(model_dir, tiny.write_dataset(tmp_path / "data", rows=6, broken=2), "align")
    assert [batch.samples for step in range(2) for batch in loader.step(4 * step)] == [4, 4]
    assert list(loader.rows.broken.values()) == ["not an image"] * 2
    assert loader.rows.total == 8


@pytest.mark.parametrize("in_record", [True, False])
def test_bytes_and_uris_give_the_same_batch(tiny: Any, model_dir: Path, tmp_path: Path, in_record: bool) -> None:
    """Where the image lies makes no difference to what is learned."""
    inside = tiny.loader(model_dir, tiny.write_dataset(tmp_path / "inside"), "align").step(0)[0]
    other = tiny.loader(model_dir, tiny.write_dataset(tmp_path / "other", in_record=in_record), "align").step(0)[0]
    assert torch.equal(inside.pixels, other.pixels) and torch.equal(inside.labels, other.labels)


def test_rows_that_teach_nothing_are_known_before_they_train(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """`examine` names what cannot be tokenized, and what loses its end at the longest row that the model can take."""
    long = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "red " * 700}]}
    late = {"conversations": [{"from": "human", "value": "red " * 700}, {"from": "gpt", "value": "red"}]}
    empty = {"conversations": [*GOOD["conversations"], {"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]}
    (tmp_path / "x.json").write_text(json.dumps([GOOD, long, late, empty]))
    templates, rows = Templates(load_processor(model_dir), 512), read_rows(tmp_path / "x.json")
    share = Share(0, 1, micro_batch=1, accumulation=1)
    Loader(rows, templates.instruct, lambda images: images, Sampler(4, 0, "x"), share, 0).examine(range(4))
    assert templates.cut == {"x.json row 1"} and set(rows.broken) == {"x.json row 2", "x.json row 3"}
    assert rows.broken["x.json row 2"] == "too long: nothing to learn within the 512 tokens that a row may have"


def test_nothing_left_is_an_error(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """A training set of broken images ends with a message that names one, not with an endless search."""
    loader = tiny.loader(model_dir, tiny.write_dataset(tmp_path / "data", rows=0, broken=3), "align")
    with pytest.raises(UserError, match="(?s)no row to train on.*not an image"):
        loader.step(0)


def test_impossible_inputs_are_named(tiny: Any, tmp_path: Path) -> None:
    """Missing, unfinished and malformed training sets: the message says which."""
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "none")
    data = tiny.write_dataset(tmp_path / "data")
    with pytest.raises(UserError, match=r"part-0\.parquet: a shard of captune's records"):
        read_rows(data / "part-0.parquet")
    (data / MANIFEST).unlink()
    with pytest.raises(UserError, match="has not finished"):
        read_rows(data)
    (tmp_path / "x.json").write_text("[{")
    with pytest.raises(UserError, match="x.json: no LLaVA dataset .not valid JSON"):
        read_rows(tmp_path / "x.json")


GOOD = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"image": "a.jpg"}, "'conversations' is not a list"),
        ({"conversations": ["hi", "yes"]}, "turn 0 is not"),
        ({"conversations": [{"from": ["human"], "value": "a"}, {"from": "gpt", "value": "x"}]}, "turn 0 is not"),
        ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}]}, "turn 0 is not"),
        ({"image": {"path": "a.jpg"}, **GOOD}, "'image' is not a file name"),
        ({"image": ["a.jpg", "b.jpg"], **GOOD}, "0 <image> placeholder(s) for 2 image(s)"),
        ({"image": ["a.jpg", None], **GOOD}, "not a picture's name: None"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "needs at least one human turn"),
        ({"conversations": [*GOOD["conversations"], {"from": "gpt", "value": "x"}]}, "take turns"),
        ({"conversations": [{"from": "system", "value": "x"}, *GOOD["conversations"]]}, "must be human or gpt"),
        ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}, "placeholder"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": " "}]}, "no answer"),
    ],
)
def test_malformed_conversations_are_counted(tmp_path: Path, entry: dict[str, Any], reason: str) -> None:
    """A bad entry among good ones is counted with its row number."""
    (tmp_path / "x.json").write_text(json.dumps([GOOD, entry]))
    rows = read_rows(tmp_path / "x.json")
    assert len(rows) == 1 and rows.total == 2
    assert reason in rows.broken["x.json row 1"]


def test_several_images_of_a_row_train_in_reading_order(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """Two in one turn and one in a later one, beside a row of text: pixels, and features of a cache, follow the
    placeholders. A picture that does not decode breaks its row, which is named.
    """
    colours = ("red", "green", "blue")
    for colour in colours:
        (tmp_path / f"{colour}.jpg").write_bytes(tiny.jpeg(colour))
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    turns = [{"from": "human", "value": "<image>\n<image>\nsame ?"}, {"from": "gpt", "value": "red"}]
    turns += [{"from": "human", "value": "and this ? <image>"}, {"from": "gpt", "value": "square"}]
    good, bad = (
        {"image": [f"{c}.jpg" for c in names], "conversations": turns} for names in (colours, ("red", "bad", "blue"))
    )
    (tmp_path / "x.json").write_text(json.dumps([GOOD, good, bad]))
    loader = tiny.loader(model_dir, tmp_path / "x.json", "instruct", micro_batch=3)
    (batch,) = loader.step(0)
    assert loader.rows.broken == {"x.json row 2": "not an image"}
    shown = (batch.input_ids == tiny.tokenizer().convert_tokens_to_ids("<image>")).sum(1).tolist()
    assert sorted(shown) in ([0, 0, 48], [0, 48, 48]) and len(batch.pixels) == sum(shown) // 16
    expected = torch.stack([loader.pixels(str(tmp_path / f"{colour}.jpg")) for colour in colours])
    assert torch.equal(batch.pixels[:3], expected) and len({p.float().mean().item() for p in expected}) == 3
    model = load_model(model_dir, "float32").model
    normalize = load_processor(model_dir).image_processor.normalize
    loader.features = features.fill(model, normalize, loader, partial(loader.images, 0, 1), 1 << 30, nullcontext)
    assert len(loader.features.slots) == 3 and list(loader.features.bad.values()) == ["not an image"]
    (cached,) = loader.step(0)
    for part, reference in zip(cached.features, features.tower_outputs(model, *normalize(batch.pixels)), strict=True):
        torch.testing.assert_close(part, reference)


def test_a_first_turn_of_the_model_is_left_out(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """As the original does, which trains on the rest."""
    greeted = {"conversations": [{"from": "gpt", "value": "hello"}, *GOOD["conversations"]]}
    (tmp_path / "x.json").write_text(json.dumps([greeted, GOOD]))
    batch = tiny.loader(model_dir, tmp_path / "x.json", "instruct", micro_batch=2).step(0)[0]
    assert torch.equal(batch.input_ids[0], batch.input_ids[1]) and torch.equal(batch.labels[0], batch.labels[1])


def test_too_many_broken_rows_are_shown_by_kind(tmp_path: Path) -> None:
    """The limit is a share; each kind comes with its number and an example; images that lie elsewhere are foreseen."""
    two = GOOD | {"image": {"path": "a.jpg"}}
    empty = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ""}]}
    (tmp_path / "x.json").write_text(json.dumps([GOOD, GOOD, two, two, empty]))
    rows = read_rows(tmp_path / "x.json")
    assert rows.require_usable(0.6) is rows
    with pytest.raises(UserError, match=r"60 % of 5 rows are unusable, and train.max_broken_share is 0.5") as refused:
        rows.require_usable(0.5)
    assert "bad row (2), e.g. x.json row 2: " in str(refused.value) and "bad conversation (1)" in str(refused.value)
    pictured = {
        "image": "gone.jpg",
        "conversations": [{"from": "human", "value": "<image>?"}, GOOD["conversations"][1]],
    }
    (tmp_path / "y.json").write_text(json.dumps([pictured] * 300 + [GOOD]))
    rows = read_rows(tmp_path / "y.json").require_usable(0.5)
    rows.look_at_images()
    with pytest.raises(UserError, match=r"100 % of 301 rows are unusable.*\n  missing file \(100\), e.g. y.json row 0"):
        rows.require_usable(0.5)


@pytest.mark.parametrize("format", ["llava", "datajuicer", "webdataset", "folder"])
def test_every_format_trains_as_the_records_do(tiny: Any, model_dir: Path, tmp_path: Path, format: str) -> None:
    """Records exported to another format give the same tokens, labels and pixels, wherever the images lie."""
    records = tiny.write_dataset(tmp_path / "records", rows=4)
    name = {"llava": "set.json", "datajuicer": "set.jsonl", "webdataset": "set.tar", "folder": "set.json"}[format]
    export(records, tmp_path / "out" / name, "llava" if format == "folder" else format)
    if format == "folder":
        for item in json.loads((tmp_path / "out" / name).read_text()):
            text = tmp_path / "out" / Path(item["image"]).with_suffix(".txt")
            text.write_text(item["conversations"][1]["value"])
    path = tmp_path / "out" / "set_images" if format == "folder" else tmp_path / "out" / name
    expected = tiny.loader(model_dir, records, "align").step(0)[0]
    found = tiny.loader(model_dir, path, "align").step(0)[0]

    def rows(batch: Any) -> list[Any]:  # the records' order is that of their ids
        found = zip(batch.pixels, batch.input_ids, batch.labels, strict=True)
        return sorted([part.flatten().tolist() for part in row] for row in found)

    assert rows(found) == rows(expected)


def test_order_is_a_function_of_the_position() -> None:
    """A restart at any position sees the same rows; an epoch holds every row once; seeds and phases differ."""
    sampler = Sampler(10, seed=1, phase="align")
    stream = sampler.at(0, 40)
    assert Sampler(10, 1, "align").at(17, 8) == stream[17:25]
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10)) and stream[:10] != stream[10:20]
    assert Sampler(10, 2, "align").at(0, 40) != stream != Sampler(10, 1, "instruct").at(0, 40)


def test_a_step_is_dealt_out_by_length(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """Which rows a step has is the shuffle's business alone; its micro-batches hold rows of like length, the longest
    first, and two workers take between them what one does.
    """
    entries = [
        {"conversations": [{"from": "human", "value": "q " * (1 + 7 * n % 40)}, {"from": "gpt", "value": "red"}]}
        for n in range(40)
    ]
    (tmp_path / "x.json").write_text(json.dumps(entries))
    loader = tiny.loader(model_dir, tmp_path / "x.json", "instruct", micro_batch=4, accumulation=4)
    for position in (0, 16, 32):
        assert sorted(sum(loader.drawn(position), [])) == sorted(loader.sampler.at(position, 16))
    batches = loader.step(0)
    lengths = [batch.input_ids.shape[1] for batch in batches]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) == 4
    filled = sum(int(batch.attention_mask.sum()) for batch in batches)
    assert filled / sum(batch.attention_mask.numel() for batch in batches) > 0.8 > filled / (16 * lengths[0])
    alone = loader.drawn(16)
    for worker in (0, 1):
        loader.share = Share(worker, 2, micro_batch=4, accumulation=2)
        assert loader.drawn(16) == alone[worker::2]


def test_threads_change_nothing(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """Rows prepared several at a time come in their order, and so do the substitutes of broken ones."""
    data = tiny.write_dataset(tmp_path / "data", rows=9, broken=4)
    one, three = (tiny.loader(model_dir, data, "align", micro_batch=5, threads=threads) for threads in (1, 3))
    for position in range(0, 30, 5):
        (expected,), (found,) = one.step(position), three.step(position)
        assert torch.equal(found.pixels, expected.pixels) and torch.equal(found.input_ids, expected.input_ids)
    assert one.rows.broken == three.rows.broken and len(one.rows.broken) == 4


def test_workers_share_a_step_without_overlap() -> None:
    """Two workers with two micro-batches take the samples that one worker with four takes."""
    alone = Share(0, 1, micro_batch=3, accumulation=4).starts(24)
    shared = [start for worker in (0, 1) for start in Share(worker, 2, 3, 2).starts(24)]
    assert sorted(shared) == alone and Share(0, 2, 3, 2).per_step == Share(0, 1, 3, 4).per_step == 12


def test_prefetch_hands_over_errors() -> None:
    """What goes wrong in the thread is raised where the batches are used."""

    def items() -> Any:
        yield 1
        raise UserError("broken")

    stream = prefetch(items(), depth=1)
    assert next(stream) == 1
    with pytest.raises(UserError, match="broken"):
        next(stream)
