"""The sample models' tokenizers: byte-level BPE with every word of the world as one token, and the special tokens of
their families.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipelines.sample.language import vocabulary_text


def opt_tokenizer(image_token: str = "<image>") -> PreTrainedTokenizerFast:
    """As OPT's: `</s>` begins and ends a text, padding is 1."""
    core = _byte_level_bpe(["<s>", "<pad>", "</s>", "<unk>", image_token])
    core.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side="left", model_max_length=128, extra_special_tokens={"image_token": image_token},
    )  # fmt: skip


def gemma_tokenizer(image_token: str = "<image>") -> PreTrainedTokenizerFast:
    """As Gemma's: `<bos>` in front, turns between `<start_of_turn>` and `<end_of_turn>`, padding is 0."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", image_token]
    core = _byte_level_bpe(specials)
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        padding_side="left", model_max_length=512, extra_special_tokens={"image_token": image_token},
    )  # fmt: skip


def _byte_level_bpe(specials: list[str]) -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s"), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    # Every word both at the start of a text and after a space, so that `cafe` and ` cafe` are one token each.
    text = [form for line in vocabulary_text() for word in line.split() for form in (word, " " + word)] + [
        "user\n",
        "model\n",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(text, trainer)
    return core
