"""Tiny tokenizers that treat seams, BOS and special tokens as those of the real language models do."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful answers.",
    "You are a helpful language and vision assistant. Answer the questions. user model system",
    "What is written on the sign? The sign says OPEN. Describe the image. A red bus next to a house.",
    "How many dogs are there? Two dogs and one cat. [INST] [/INST] it's 3 o'clock, isn't it?",
]


def _fast(tokenizer: Tokenizer, bos: str | None, specials: list[str], **kwargs: object) -> PreTrainedTokenizerFast:
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, model_max_length=2048, **kwargs)
    fast.add_special_tokens({"additional_special_tokens": specials})
    return fast


def byte_level(bos: str | None, eos: str, pad: str, specials: list[str]) -> PreTrainedTokenizerFast:
    """Bytes as characters and no space in front: Gemma, Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    known = [token for token in dict.fromkeys([pad, eos, bos, "<unk>", *specials]) if token]
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=known, initial_alphabet=alphabet, show_progress=False),
    )
    return _fast(tokenizer, bos, specials, eos_token=eos, pad_token=pad, unk_token="<unk>")


def sentencepiece_like(
    bos: str | None, legacy: bool, specials: list[str], eos: str = "</s>"
) -> PreTrainedTokenizerFast:
    """Spaces as "▁" with one in front: Llama, Vicuna, Mistral, Yi. `legacy` also puts one after each special token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    known = [token for token in dict.fromkeys(["<unk>", bos, eos, *specials]) if token]
    alphabet = [chr(code) for code in range(33, 127)] + ["▁", "\n"]
    pieces = [word for text in CORPUS for word in text.replace(" ", " ▁").split(" ")]
    tokenizer.train_from_iterator(
        pieces,
        trainers.BpeTrainer(vocab_size=400, special_tokens=known, initial_alphabet=alphabet, show_progress=False),
    )
    fast = _fast(tokenizer, bos, specials, eos_token=eos, unk_token="<unk>", pad_token="<unk>")
    fast.legacy = legacy
    return fast


def tokenizer_for(template: str) -> PreTrainedTokenizerFast:
    """A tokenizer of the kind that the template's models have. "vicuna_v1-legacy" is vicuna_v1 with the older seams."""
    if template in ("gemma", "plain"):
        return byte_level("<bos>", "<eos>", "<pad>", ["<start_of_turn>", "<end_of_turn>", "<image>"])
    if template == "llama_3":
        headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|reserved_special_token_0|>", "<image>"]
        return byte_level("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", headers)
    if template == "chatml_direct":
        return sentencepiece_like(None, True, ["<|im_start|>", "<|im_end|>", "<image>"], eos="<|im_end|>")
    return sentencepiece_like("<s>", template != "vicuna_v1", ["<image>"])
