"""Random conversations through the original's `preprocess_*` functions and through ours: tokens and labels must be
equal.

    git clone https://github.com/dvlab-research/MGM
    python -m tests.pipelines.mgm.compare_masks --original MGM [--count 300] [--seed 0] [--record FILE]

The functions are taken out of the original's `train.py` as they are. Conversations are as odd as real data: empty
turns, images in the middle, a first turn by the assistant, separators inside text, unknown characters, more than fits.
`--record` writes what the original gives for `ODD` instead: `data/odd_masks.json`, which the tests read.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib.util
import io
import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import torch

from pipelines.mgm.conversation import IGNORE_INDEX, BadConversation, encode_conversation
from tests.tiny_tokenizers import tokenizer_for

KINDS = ["gemma", "vicuna_v1", "vicuna_v1-legacy", "llama_3", "mistral_instruct", "chatml_direct", "plain"]
PIECES = [
    "What is written on the sign?", "OPEN", "a red bus", "Two dogs and one cat.", "it's 3 o'clock", "", " ", "\n",
    "é 漢",
    "ASSISTANT: ", "</s>", "<eos>", "[/INST] ", "<|eot_id|>", "<|im_end|>", "USER", "<start_of_turn>model\n", "<unk>",
]  # fmt: skip
# name, largest length, (human, gpt) rounds
ODD: list[tuple[str, int, list[tuple[str, str]]]] = [
    ("empty answer", 2048, [("<image>\nWhat?", ""), ("Sure?", "Two dogs.")]),
    ("empty question", 2048, [("<image>\nWhat?", "OPEN"), ("", "Two dogs.")]),
    ("image in the middle", 2048, [("What is <image> it?", "A bus."), ("Sure?", "it's red")]),
    ("image in a later turn", 2048, [("Hi", "Hello."), ("What is it?\n<image>", "A bus.")]),
    ("two images", 2048, [("<image>\nWhat?", "A bus."), ("And <image>", "Two dogs.")]),
    ("separator in the answer", 2048, [("<image>\nWhat?", "ASSISTANT: OPEN </s> <eos>"), ("Sure?", "Two dogs.")]),
    ("unknown characters", 2048, [("<image>\n\u6f22 <unk>", "\u6f22 OPEN"), ("Sure?", "Two dogs.")]),
    ("cut in an answer", 190, [("What?", "Two dogs and one cat. OPEN " * 30), ("Sure?", "Two dogs.")]),
    ("cut after the image", 190, [("<image>\nWhat?", "Two dogs and one cat. " * 30)]),
]


def import_preprocess(root: Path) -> types.SimpleNamespace:
    """`preprocess` and `preprocess_multimodal` with what they call; nothing else of the original is imported."""

    def load(name: str, path: Path) -> types.ModuleType:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        return sys.modules[name]

    sys.modules["mgm"] = types.ModuleType("mgm")
    constants = load("mgm.constants", root / "mgm" / "constants.py")
    library = load("mgm.conversation", root / "mgm" / "conversation.py")
    utils = load("mgm.mm_utils", root / "mgm" / "mm_utils.py")
    tree = ast.parse((root / "mgm" / "train" / "train.py").read_text())
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith(("preprocess", "_tokenize_fn", "_mask_targets"))
    ]
    for function in tree.body:
        assert isinstance(function, ast.FunctionDef)
        function.returns = None
        for argument in function.args.args:
            argument.annotation = None
    scope: dict[str, Any] = {"torch": torch, "copy": copy, "conversation_lib": library} | vars(constants)
    scope |= {"tokenizer_image_token": utils.tokenizer_image_token, "IS_TOKENIZER_GREATER_THAN_0_14": True}
    exec(compile(tree, "train.py", "exec"), scope)
    return types.SimpleNamespace(**scope, library=library)


def theirs(
    original: types.SimpleNamespace, tokenizer: Any, template: str, turns: list[dict[str, str]], image: bool
) -> tuple[list[int], list[int]]:
    """The original's tokens and labels of one sample, cut as its collator cuts them."""
    original.library.default_conversation = original.library.conv_templates[template]
    sources = [copy.deepcopy(turns)]
    if image:
        arguments = types.SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
        sources = original.preprocess_multimodal(sources, arguments)
    with contextlib.redirect_stdout(io.StringIO()):
        out = original.preprocess(sources, tokenizer, has_image=image)
    limit = tokenizer.model_max_length
    return out["input_ids"][0].tolist()[:limit], out["labels"][0].tolist()[:limit]


def random_turns(rng: random.Random, kind: str, image: bool) -> list[dict[str, str]]:
    """A conversation of one to four rounds."""
    odd = rng.random() < 0.3

    def text() -> str:
        pool = PIECES if odd else PIECES[:6]
        return " ".join(rng.choice(pool) for _ in range(rng.choice([1, 1, 2, 3, 12])))

    rounds = 1 if kind == "plain" else rng.randint(1, 4)
    turns = [{"from": "human" if n % 2 == 0 else "gpt", "value": text()} for n in range(2 * rounds)]
    if rng.random() < 0.1 and kind != "plain":
        turns.insert(0, {"from": "gpt", "value": "Hello."})
    if image:
        human = rng.choice([turn for turn in turns if turn["from"] == "human"])
        human["value"] = rng.choice(["<image>\n{}", "{}\n<image>", "{} <image> {}"]).replace("{}", human["value"])
    return turns


def record(original: types.SimpleNamespace, path: Path) -> None:
    """Write the original's tokens and labels of `ODD` for every kind of tokenizer but plain's, one case a line."""
    lines = []
    for kind in KINDS[:-1]:
        tokenizer = tokenizer_for(kind)
        for name, limit, rounds in ODD:
            tokenizer.model_max_length = limit
            turns = [
                {"from": who, "value": text}
                for pair in rounds
                for who, text in zip(("human", "gpt"), pair, strict=True)
            ]
            image = any("<image>" in turn["value"] for turn in turns)
            ids, labels = theirs(original, tokenizer, kind.split("-")[0], turns, image)
            case = {"template": kind, "case": name, "max_length": limit, "conversation": turns}
            lines.append(json.dumps(case | {"input_ids": ids, "labels": labels}, separators=(",", ":")))
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def main() -> None:
    """Print, for each kind of tokenizer, how many conversations were equal; stop at the first that is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--original", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path)
    args = parser.parse_args()
    original = import_preprocess(args.original)
    if args.record:
        record(original, args.record)
        return
    for kind in KINDS:
        tokenizer, template = tokenizer_for(kind), kind.split("-")[0]
        visual = tokenizer.convert_tokens_to_ids("<image>")
        rng, equal, masked, refused = random.Random(args.seed), 0, 0, 0
        for number in range(args.count):
            image = kind == "plain" or rng.random() < 0.6
            turns = random_turns(rng, kind, image)
            tokenizer.model_max_length = rng.choice([60, 2048])
            try:
                expected = theirs(original, tokenizer, template, turns, image)
            except AssertionError:
                expected = None
            try:
                limit = tokenizer.model_max_length
                ids, labels = encode_conversation(tokenizer, turns, template, max_length=limit)
            except BadConversation as error:
                assert expected is None, (kind, number, turns, error)
                refused += 1
                continue
            assert expected is not None, (kind, number, turns)
            ids, labels = ids[:limit], labels[:limit]
            assert ids == [visual if token == -200 else token for token in expected[0]], (kind, number, turns)
            wanted = [IGNORE_INDEX if label == -200 else label for label in expected[1]]
            assert labels == wanted, (kind, number, limit, turns, list(zip(ids, labels, wanted, strict=True)))
            equal += 1
            masked += all(label == IGNORE_INDEX for label in labels)
        print(f"{kind}: {equal} equal ({masked} of them masked whole), {refused} refused by both")


if __name__ == "__main__":
    main()
