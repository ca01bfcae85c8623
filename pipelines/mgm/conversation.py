"""Training conversations as tokens and labels, equal to the original's `preprocess_*` functions.

The original finds the loss mask by splitting the rendered prompt into rounds, tokenizing each round and the part of it
before the answer, and adding up lengths. Which tokens get a loss then depends on how a tokenizer treats the seams, so
equal masks need the same arithmetic; it is kept here, once, with one row of numbers per format (`_Seams`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

from pipelines.mgm.templates import TEMPLATES, Template, get_template

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

IGNORE_INDEX = -100
IMAGE = "<image>"
_PLACEHOLDER = -200  # one image, before it is expanded to its visual tokens; as in the original, not a token id
_HIDDEN = 0xF0000  # first of the private characters that stand for what a caption spells, see `_hide`

Turn = Mapping[str, str]
Tokenize = Callable[[str], list[int]]


class BadConversation(Exception):
    """This conversation cannot be trained on; the text is the reason."""


@dataclass(frozen=True)
class _Seams:
    """How one format's rounds are measured.

    Attributes:
        split: closes a round.
        answer: separates instruction and answer within a round.
        start: tokens before the first round (BOS).
        round, instruction: added to the token counts of a round and of the part of it before the answer.
        legacy: added to both from the second round on for tokenizers that are not "legacy" (sentencepiece's handling of
            the space at a seam), or, for `paired` formats, in every round for those that are.
        paired: whether `split` closes each turn, not each round (the first round then also holds the system turn).
    """

    split: str
    answer: str
    start: int
    round: int
    instruction: int
    legacy: int = 0
    paired: bool = False


def _seams(template: Template) -> _Seams:
    if template.style == "gemma":
        return _Seams(split="<eos>", answer=template.assistant, start=1, round=0, instruction=-1)
    if template.style == "two":
        # -2: BOS, and the space after "ASSISTANT:" that belongs to the answer's first token
        return _Seams(split="</s>", answer=f" {template.assistant}: ", start=1, round=0, instruction=-2, legacy=-1)
    if template.style == "llama_2":
        return _Seams(split="</s>", answer="[/INST] ", start=1, round=0, instruction=-2)
    if template.style == "llama_3":
        answer = template.end + template.assistant
        return _Seams(split=template.end, answer=answer, start=1, round=0, instruction=-1, paired=True)
    answer = template.end + template.assistant
    return _Seams(split=template.end, answer=answer, start=0, round=0, instruction=-1, legacy=1, paired=True)


def render_conversation(conversation: Sequence[Turn], template: str) -> str:
    """The prompt of a conversation in LLaVA's form (`from`: human or gpt, `value`), without BOS.

    A last turn whose `value` is empty or None asks for an answer: only its introduction is written. Leading turns that
    are not the human's are skipped.

    Raises:
        BadConversation: the roles do not alternate, or the first turn is empty in a format without headers.
    """
    form = get_template(template)
    turns = alternating(conversation)
    if form.style == "plain":
        return "".join((turn["value"] or "") + (form.end if index % 2 else "") for index, turn in enumerate(turns))
    if form.style == "llama_2" and not turns[0]["value"]:
        raise BadConversation(f"turn 0: empty, which template {template} has no form for")
    prompt = {"two": form.system + " ", "gemma": "", "llama_2": ""}.get(form.style, form.system + form.end)
    for index, turn in enumerate(turns):
        prompt += _render_turn(form, index, turn["value"])
    return prompt


def _render_turn(form: Template, index: int, text: str | None) -> str:
    answer = index % 2 == 1
    head = form.assistant if answer else form.user
    if form.style == "two":
        return f"{head}: {text}{form.end if answer else ' '}" if text else f"{head}:"
    if form.style == "gemma":
        return head + (f"{text}<end_of_turn>\n{form.end if answer else ''}" if text else "")
    if form.style == "llama_2":
        if not text:
            return ""
        return f" {text} {form.end}" if answer else f"{'<s>' if index else ''}[INST] {text} [/INST]"
    return head + (text + form.end if text else "")


def alternating(conversation: Sequence[Turn]) -> list[Turn]:
    """The turns that train: those of a human and a model in turn. A first turn that is the model's is left out.

    Raises:
        BadConversation: another speaker, one who speaks twice in a row, or nobody.
    """
    turns = list(conversation)
    for number, turn in enumerate(turns):
        if turn["from"] not in ("human", "gpt"):
            raise BadConversation(f"turn {number}: 'from' must be human or gpt, not '{turn['from']}'")
    if turns and turns[0]["from"] != "human":
        turns = turns[1:]
    for number, turn in enumerate(turns):
        if turn["from"] != ("gpt" if number % 2 else "human"):
            raise BadConversation(f"turn {number}: human and gpt must take turns, {turn['from']} comes twice")
    if not turns:
        raise BadConversation("a conversation needs at least one human turn")
    return turns


def images_first(conversation: Sequence[Turn]) -> list[dict[str, str]]:
    """Placeholders to the front of their turn, each followed by a newline, as the original trains."""
    moved = []
    for turn in conversation:
        value = turn["value"]
        if count := value.count(IMAGE):
            value = (f"{IMAGE}\n" * count + value.replace(IMAGE, "").strip()).strip()
        moved.append({"from": turn["from"], "value": value})
    return moved


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Sequence[Turn],
    template: str,
    num_image_tokens: int = 1,
    num_images: int | None = None,
    max_length: int | None = None,
    captions: bool = False,
) -> tuple[list[int], list[int]]:
    """Tokens and labels of one training conversation.

    Args:
        tokenizer: knows `<image>` as one token (`MGMProcessor` sees to that).
        conversation: LLaVA's form: `from` (human, gpt) and `value`, `<image>` standing for an image.
        template: a name of `templates.TEMPLATES`.
        num_image_tokens: visual tokens of one image, `MGMConfig.num_image_tokens`.
        num_images: how many images the sample has, checked against the placeholders (None: not checked).
        max_length: where the caller will cut: the original gives a longer conversation a loss as far as it goes.
        captions: the answers are captions from anywhere: a special token, a separator or `<image>` that one spells is
            text. Without it they are what they are to the original.

    Returns:
        input_ids and labels, equally long and not cut. -100, no loss, where the prompt and images are, and on the whole
        sample when the rounds' lengths do not add up (an empty turn, a separator inside a text), as in the original.

    Raises:
        BadConversation: placeholders and images do not match, or roles do not alternate.
    """
    form = get_template(template)
    turns, spelled = alternating(conversation), list[str]()
    if captions:
        turns = [turn if turn["from"] == "human" else _hide(tokenizer, form, turn, spelled) for turn in turns]
    found = sum(turn["value"].count(IMAGE) for turn in turns)
    if num_images is not None and found != num_images:
        raise BadConversation(f"the conversation has {found} {IMAGE} placeholders for {num_images} image(s)")
    tokenize = partial(_tokenize, tokenizer, spelled)
    if form.style == "plain":
        ids, labels = _encode_plain(tokenize, turns, form)
    else:
        prompt = render_conversation(images_first(turns), template)
        ids = tokenize(prompt)
        labels = _mask(tokenizer, tokenize, prompt, ids, form, max_length or tokenizer.model_max_length)
    image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE))  # type: ignore[arg-type]
    return _expand(ids, labels, image_token_id, num_image_tokens)


def template_of(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> str | None:
    """The template that a chat template asks by: the one that gives the same conversation. None: another's."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    if chat_template is None:
        return None
    asked = str(tokenizer.apply_chat_template(messages, chat_template=chat_template, tokenize=False))
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    bos = tokenizer.bos_token or ""
    return next((name for name in TEMPLATES if asked.removeprefix(bos) == render_conversation(turns, name)), None)


def _hide(tokenizer: PreTrainedTokenizerBase, form: Template, turn: Turn, spelled: list[str]) -> Turn:
    """The turn with a private character in place of everything that a tokenizer or `_mask` would take for markup; the
    n-th character from `_HIDDEN` on stands for `spelled[n]`.
    """

    def character(match: re.Match[str]) -> str:
        spelled.append(match.group())
        return chr(_HIDDEN + len(spelled) - 1)

    return {"from": turn["from"], "value": _markup(tokenizer, form).sub(character, turn["value"])}


@lru_cache(maxsize=32)
def _markup(tokenizer: PreTrainedTokenizerBase, form: Template) -> re.Pattern[str]:
    """Special tokens and the template's separators, longer ones first."""
    words = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} | {IMAGE}
    if form.style != "plain":
        words |= {_seams(form).split, _seams(form).answer}
    return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))


def _tokenize(tokenizer: PreTrainedTokenizerBase, spelled: Sequence[str], prompt: str) -> list[int]:
    """Token ids with the tokenizer's special tokens in front, once, and `_PLACEHOLDER` for each image. What is hidden
    in the prompt is tokenized as text.
    """
    chunks = [_tokenize_text(tokenizer, spelled, chunk) for chunk in prompt.split(IMAGE)]
    bos = int(bool(chunks[0]) and chunks[0][0] == tokenizer.bos_token_id)
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = [*ids, _PLACEHOLDER, *chunk[bos:]]
    return ids


def _tokenize_text(tokenizer: PreTrainedTokenizerBase, spelled: Sequence[str], text: str) -> list[int]:
    if not spelled:
        return list(tokenizer(text, verbose=False).input_ids)
    hidden = f"([{chr(_HIDDEN)}-{chr(_HIDDEN + len(spelled) - 1)}])"
    first, *rest = re.split(hidden, text)
    ids = list(tokenizer(first, verbose=False).input_ids)
    for number, piece in enumerate(rest):
        piece = spelled[ord(piece) - _HIDDEN] if number % 2 == 0 else piece
        if piece:
            ids += tokenizer(piece, add_special_tokens=False, split_special_tokens=number % 2 == 0).input_ids
    return ids


def _encode_plain(tokenize: Tokenize, turns: list[Turn], form: Template) -> tuple[list[int], list[int]]:
    """The image, then its caption. The human's words are dropped."""
    if len(turns) != 2 or IMAGE not in turns[0]["value"]:
        raise BadConversation(f"template plain: a sample is one human turn with {IMAGE} and one answer")
    ids = tokenize(IMAGE + turns[1]["value"] + form.end)
    masked = len(tokenize(IMAGE))
    return ids, [IGNORE_INDEX] * masked + ids[masked:]


def _mask(
    tokenizer: PreTrainedTokenizerBase, tokenize: Tokenize, prompt: str, ids: list[int], form: Template, max_length: int
) -> list[int]:
    """Labels: the ids of answers, -100 elsewhere. The arithmetic is the original's, see the module."""
    seams = _seams(form)
    legacy = bool(getattr(tokenizer, "legacy", False))
    labels = list(ids)
    position = seams.start
    labels[:position] = [IGNORE_INDEX] * position
    for index, text in enumerate(_rounds(prompt, seams)):
        parts = text.split(seams.answer)
        if text == "" or len(parts) != 2:
            break
        seam = legacy if seams.paired else index > 0 and not legacy
        shift = seams.legacy if seam else 0
        length = len(tokenize(text)) + seams.round + shift
        instruction = len(tokenize(parts[0] + seams.answer)) + seams.instruction + shift
        end = min(position + max(instruction, 0), len(labels))
        labels[position:end] = [IGNORE_INDEX] * (end - position)
        position += length
    labels[position:] = [IGNORE_INDEX] * len(labels[position:])
    padding = _padding(tokenizer, form)
    total = sum(token != padding for token in ids)
    return labels if position == total or position >= max_length else [IGNORE_INDEX] * len(ids)


def _padding(tokenizer: PreTrainedTokenizerBase, form: Template) -> int | None:
    """The token that the original pads with and therefore does not count, wherever it stands: Gemma's own, a reserved
    one for Llama 3, else the unknown token. What a tokenizer pads with here does not matter.
    """
    if form.style == "gemma":
        return tokenizer.pad_token_id
    if form.style == "llama_3":
        return int(tokenizer.convert_tokens_to_ids("<|reserved_special_token_0|>"))  # type: ignore[arg-type]
    return tokenizer.unk_token_id


def _rounds(prompt: str, seams: _Seams) -> list[str]:
    pieces = prompt.split(seams.split)
    if not seams.paired:
        return pieces
    first = seams.split.join(pieces[:3])  # system, human, gpt
    return [first, *(seams.split.join(pieces[start : start + 2]) for start in range(3, len(pieces), 2))]


def _expand(
    ids: list[int], labels: list[int], image_token_id: int, num_image_tokens: int
) -> tuple[list[int], list[int]]:
    """Each placeholder becomes `num_image_tokens` image tokens without loss."""
    new_ids: list[int] = []
    new_labels: list[int] = []
    for token, label in zip(ids, labels, strict=True):
        if token == _PLACEHOLDER:
            new_ids += [image_token_id] * num_image_tokens
            new_labels += [IGNORE_INDEX] * num_image_tokens
        else:
            new_ids.append(token)
            new_labels.append(label)
    return new_ids, new_labels
