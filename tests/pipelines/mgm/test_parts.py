"""Tokenizers that come as a sentencepiece model alone: the ids that they were published with, however often saved."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import LlamaConfig

from pipelines.errors import UserError
from pipelines.mgm.parts import load_tokenizer
from pipelines.mgm.processing import MGMProcessor
from tests.tiny_tokenizers import CORPUS

from .conftest import tiny_config

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
TEXTS = ["USER: What is it? ASSISTANT: OPEN</s>USER: Two</s>", "[INST] Hi [/INST]a</s>[INST] 1", "a  b", "é 12\n"]


@pytest.fixture(scope="module")
def sentences() -> bytes:
    """Of Llama's kind: bytes for what is unknown, a space in front."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=400, model_type="bpe", minloglevel=2,
        byte_fallback=True, hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
    )  # fmt: skip
    return model.getvalue()


def _published(text: str, reader: sentencepiece.SentencePieceProcessor, legacy: bool) -> list[int]:
    """Ids as of the slow tokenizer that the original code used: each text between special tokens by itself, with
    sentencepiece's space in front; only the first has one where `legacy` is off.
    """
    ids = [1]
    for number, part in enumerate(text.split("</s>")):
        own = reader.encode(part) if part else []
        if number > 0 and not legacy and own:
            own = reader.encode("\n" + part)[len(reader.encode("\n")) :]
        ids += own + [2] * (number < text.count("</s>"))
    return ids


@pytest.mark.parametrize(
    ("settings", "legacy"),
    [
        ({"tokenizer_class": "LlamaTokenizer", "legacy": True, **TOKENS}, True),
        ({"tokenizer_class": "LlamaTokenizer", "legacy": False, **TOKENS}, False),
        ({"tokenizer_class": "LlamaTokenizer", **TOKENS}, True),
        ({"tokenizer_class": "LlamaTokenizerFast", "legacy": None, **TOKENS}, True),
        (None, True),
    ],
    ids=["legacy", "not legacy", "silent", "null", "no settings"],
)
def test_a_sentencepiece_model_keeps_its_seams(
    sentences: bytes, tmp_path: Path, settings: dict[str, Any] | None, legacy: bool
) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "tokenizer.model").write_bytes(sentences)
    if settings is not None:
        (tmp_path / "0" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path / "0", "llama", tmp_path)
    reader = sentencepiece.SentencePieceProcessor(model_proto=sentences)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == _published(text, reader, legacy), text
    image = MGMProcessor.add_image_token(tokenizer)
    config = tiny_config(tokenizer, text_config=LlamaConfig(vocab_size=len(tokenizer)), image_token_id=image)
    processor = MGMProcessor.from_config(config, tokenizer, "vicuna_v1")
    for turn in (1, 2):
        processor.save_pretrained(tmp_path / str(turn))
        processor = MGMProcessor.from_pretrained(tmp_path / str(turn))
        for text in TEXTS:
            assert processor.tokenizer(text)["input_ids"] == _published(text, reader, legacy), (turn, text)


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece")
    with pytest.raises(UserError, match="published: its tokenizer cannot be read"):
        load_tokenizer(tmp_path, "llama", Path("published"))
