"""Prompts and loss masks against those that the original's `preprocess_*` functions gave (data/*masks.json)."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.errors import UserError
from pipelines.mgm.conversation import IGNORE_INDEX, encode_conversation, render_conversation
from pipelines.mgm.templates import CHAT_TEMPLATES, TEMPLATES

from .conftest import load_masks
from .mgm_tokenizers import tokenizer_for

TOKENIZERS = ["gemma", "vicuna_v1", "vicuna_v1-legacy", "llama_3", "mistral_instruct", "chatml_direct", "plain"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_and_labels_equal_the_originals(kind: str) -> None:
    tokenizer = tokenizer_for(kind)
    image = tokenizer.convert_tokens_to_ids("<image>")
    cases = [case for case in load_masks() if case["template"] == kind]
    assert cases
    for case in cases:
        limit = case.get("max_length", 2048)
        ids, labels = encode_conversation(tokenizer, case["conversation"], kind.split("-")[0], max_length=limit)
        assert ids == [image if token == -200 else token for token in case["input_ids"]], case["case"]
        assert labels == [IGNORE_INDEX if label == -200 else label for label in case["labels"]], case["case"]


def test_placeholder_becomes_visual_tokens_without_loss() -> None:
    tokenizer = tokenizer_for("gemma")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}]
    short, short_labels = encode_conversation(tokenizer, turns, "gemma")
    ids, labels = encode_conversation(tokenizer, turns, "gemma", num_image_tokens=9, num_images=1)
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert ids.count(image) == 9 and len(ids) == len(short) + 8 == len(labels)
    assert [label for label in labels if label >= 0] == [label for label in short_labels if label >= 0]


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_chat_template_gives_the_training_prompt(name: str) -> None:
    tokenizer = tokenizer_for(name)
    turns = [
        {"from": "human", "value": "<image>\nWhat is it?" if name != "plain" else "<image>"},
        {"from": "gpt", "value": "A 'bus'."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": ""},
    ]
    turns = turns[:2] if name == "plain" else turns
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if not turn["value"]:
            continue
        text = turn["value"].replace("<image>\n", "").replace("<image>", "")
        content = [{"type": "text", "text": text}]
        if "<image>" in turn["value"]:
            content.append({"type": "image", "text": ""})  # the image goes first, wherever it stands
        messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": content})
    prompt = tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATES[name], add_generation_prompt=name != "plain", tokenize=False
    )
    bos = tokenizer.bos_token if TEMPLATES[name].bos else ""
    assert prompt == bos + render_conversation(turns, name)


def test_system_message_replaces_the_templates_own() -> None:
    tokenizer = tokenizer_for("vicuna_v1")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATES["vicuna_v1"], tokenize=False)
    assert prompt == "<s>Be brief. USER: Hi "


@pytest.mark.parametrize(
    ("turns", "template", "message"),
    [
        ([("human", "<image> and <image>"), ("gpt", "x")], "gemma", "2 <image> placeholders for 1"),
        ([("human", "no image"), ("gpt", "x")], "gemma", "0 <image> placeholders for 1"),
        ([("human", "<image>"), ("human", "again")], "gemma", "take turns"),
        ([("user", "<image>")], "gemma", "must be human or gpt"),
        ([("human", "<image>"), ("gpt", "x"), ("human", "y"), ("gpt", "z")], "plain", "one human turn"),
    ],
)
def test_impossible_conversations_are_user_errors(turns: list[tuple[str, str]], template: str, message: str) -> None:
    conversation = [{"from": role, "value": value} for role, value in turns]
    with pytest.raises(UserError, match=message):
        encode_conversation(tokenizer_for("gemma"), conversation, template, num_images=1)


def test_max_length_never_cuts_an_image() -> None:
    tokenizer = tokenizer_for("gemma")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus." * 10}]
    ids, labels = encode_conversation(tokenizer, turns, "gemma", num_image_tokens=4, max_length=20)
    assert len(ids) == len(labels) == 20
    with pytest.raises(UserError, match="cuts into an image"):
        encode_conversation(tokenizer, turns, "gemma", num_image_tokens=40, max_length=20)
