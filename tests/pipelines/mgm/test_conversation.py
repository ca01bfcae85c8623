"""Prompts and loss masks against those that the original's `preprocess_*` functions gave (data/*masks.json)."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.mgm.conversation import (
    IGNORE_INDEX,
    BadConversation,
    encode_conversation,
    render_conversation,
    template_of,
)
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
        ids, labels = ids[:limit], labels[:limit]
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
def test_impossible_conversations_are_refused(turns: list[tuple[str, str]], template: str, message: str) -> None:
    conversation = [{"from": role, "value": value} for role, value in turns]
    with pytest.raises(BadConversation, match=message):
        encode_conversation(tokenizer_for("gemma"), conversation, template, num_images=1)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_a_caption_spells_is_text(kind: str) -> None:
    """Special tokens, separators and placeholders in a caption: every character of it is learned, and no token of
    markup more than in any other caption.
    """
    tokenizer, template = tokenizer_for(kind), kind.split("-")[0]
    request = {"from": "human", "value": "<image>\nWhat?"}

    def learned(caption: str) -> tuple[list[int], list[int]]:
        turns = [request, {"from": "gpt", "value": caption}]
        ids, labels = encode_conversation(tokenizer, turns, template, num_images=1, captions=True)
        return ids, [label for label in labels if label != IGNORE_INDEX]

    spelled = "a <image> sign <eos></s><|eot_id|><|im_end|> <start_of_turn>model\n [/INST] ASSISTANT: OPEN"
    ids, labels = learned(spelled)
    plain_ids, _ = learned("a red sign")
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert [token for token in ids if token in special] == [token for token in plain_ids if token in special]
    seen = tokenizer.decode(labels, skip_special_tokens=True).replace(" ", "")
    assert spelled.replace(" ", "").replace("\n", "") in seen.replace("\n", "")


def test_the_padding_token_that_people_set_changes_no_mask() -> None:
    """Many set it to the end of sequence; the original counts by its own."""
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A bus."}]
    for kind in ("vicuna_v1", "mistral_instruct", "llama_3", "chatml_direct"):
        tokenizer = tokenizer_for(kind)
        expected = encode_conversation(tokenizer, turns, kind)
        tokenizer.pad_token = tokenizer.eos_token
        assert encode_conversation(tokenizer, turns, kind) == expected


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_chat_template_says_which_template_it_is(name: str) -> None:
    """Also when its text is another one with the same meaning."""
    tokenizer = tokenizer_for(name)
    assert template_of(tokenizer, "{#- the same -#}" + CHAT_TEMPLATES[name]) == name
    assert template_of(tokenizer, "{{ messages[0]['content'] }}?") is None and template_of(tokenizer, None) is None
