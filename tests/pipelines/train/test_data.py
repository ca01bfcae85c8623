from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.errors import UserError
from pipelines.manifest import MANIFEST
from pipelines.train.data import IGNORE, Sampler, Share, prefetch
from pipelines.train.rows import read_rows


def _target_text(batch: Any, tokenizer: Any, row: int) -> str:
    return str(tokenizer.decode(batch.labels[row][batch.labels[row] != IGNORE]))


def test_align_learns_the_caption_and_its_end_after_the_image(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """`plain`: image tokens carry no loss, every token of the caption and the end of sequence do."""
    loader = tiny.loader(model_dir, tiny.write_dataset(tmp_path / "data"), "align")
    batch = loader.step(0)[0]
    tokenizer = tiny.tokenizer()
    text = _target_text(batch, tokenizer, 0)
    assert text.startswith("a square of the colour") and text.endswith(".<eos>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert (batch.input_ids == image).sum(1).tolist() == [16] * 4
    assert batch.input_ids[0, :2].tolist() == [tokenizer.bos_token_id, image]
    assert batch.pixels.shape == (4, 3, 64, 64) and batch.pixels.dtype == torch.uint8
    assert batch.targets == int((batch.labels != IGNORE).sum())


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


def test_nothing_left_is_an_error(tiny: Any, model_dir: Path, tmp_path: Path) -> None:
    """A training set of broken images ends with a message that names one, not with an endless search."""
    loader = tiny.loader(model_dir, tiny.write_dataset(tmp_path / "data", rows=0, broken=3), "align")
    with pytest.raises(UserError, match="no row to train on.*not an image"):
        loader.step(0)


def test_impossible_inputs_are_named(tiny: Any, tmp_path: Path) -> None:
    """Missing, unfinished and malformed training sets: the message says which."""
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "none")
    data = tiny.write_dataset(tmp_path / "data")
    (data / MANIFEST).unlink()
    with pytest.raises(UserError, match="has not finished"):
        read_rows(data)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match="x.json: not valid JSON"):
        read_rows(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="is a list of conversations"):
        read_rows(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"image": "a.jpg"}, "no 'conversations'"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "alternate"),
        ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}, "placeholder"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": " "}]}, "no answer"),
        ({"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}]}, "needs 'from'"),
    ],
)
def test_malformed_conversations_are_counted(tmp_path: Path, entry: dict[str, Any], reason: str) -> None:
    """A bad entry among good ones is counted with its row number."""
    good = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]}
    (tmp_path / "x.json").write_text(json.dumps([good, entry]))
    rows = read_rows(tmp_path / "x.json")
    assert len(rows) == 1 and rows.total == 2
    assert reason in rows.broken["x.json row 1"]


def test_order_is_a_function_of_the_position() -> None:
    """A restart at any position sees the same rows; an epoch holds every row once; seeds and phases differ."""
    sampler = Sampler(10, seed=1, phase="align")
    stream = sampler.at(0, 40)
    assert Sampler(10, 1, "align").at(17, 8) == stream[17:25]
    assert sorted(stream[:10]) == sorted(stream[10:20]) == list(range(10)) and stream[:10] != stream[10:20]
    assert Sampler(10, 2, "align").at(0, 40) != stream != Sampler(10, 1, "instruct").at(0, 40)


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
