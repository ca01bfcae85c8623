"""Training conversations as tokens and labels, equal to the original's `preprocess_*` functions.

The original finds the loss mask by splitting the rendered prompt into rounds, tokenizing each round and the part of it
before the answer, and adding up lengths. Which tokens get a loss then depends on how a tokenizer treats the seams, so
equal masks need the same arithmetic; it is kept here, once, with one row of numbers per format (`_Seams`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pipelines.errors import UserError
from pipelines.mgm.templates import Template, get_template

IGNORE_INDEX = -100
IMAGE = "<image>"
_PLACEHOLDER = -200  # one image, before it is expanded to its visual tokens; as in the original, not a token id

log = logging.getLogger(__name__)

Turn = Mapping[str, str]


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
        UserError: the roles do not alternate, or the first turn is empty in a format without headers.
    """
    form = get_template(template)
    turns = _alternating(conversation)
    if form.style == "plain":
        return "".join((turn["value"] or "") + (form.end if index % 2 else "") for index, turn in enumerate(turns))
    if form.style == "llama_2" and not turns[0]["value"]:
        raise UserError(f"conversation turn 0: empty, which template {template} has no form for")
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


def _alternating(conversation: Sequence[Turn]) -> list[Turn]:
    turns = list(conversation)
    for number, turn in enumerate(turns):
        if turn.get("from") not in ("human", "gpt"):
            raise UserError(f"conversation turn {number}: 'from' must be human or gpt, not {turn.get('from')!r}")
    if turns and turns[0]["from"] != "human":
        turns = turns[1:]
    for number, turn in enumerate(turns):
        if turn["from"] != ("gpt" if number % 2 else "human"):
            raise UserError(f"conversation turn {number}: human and gpt must take turns, {turn['from']} comes twice")
    if not turns:
        raise UserError("a conversation needs at least one human turn")
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
) -> tuple[list[int], list[int]]:
    """Tokens and labels of one training conversation.

    Args:
        tokenizer: knows `<image>` as one token (`MGMProcessor` sees to that).
        conversation: LLaVA's form: `from` (human, gpt) and `value`, `<image>` standing for an image.
        template: a name of `templates.TEMPLATES`.
        num_image_tokens: visual tokens of one image, `MGMConfig.num_image_tokens`.
        num_images: how many images the sample has, checked against the placeholders (None: not checked).
        max_length: cut off what is longer. Only text is ever cut: see Raises.

    Returns:
        input_ids and labels, equally long. -100 where there is no loss: prompts, images, and the whole sample (with a
        warning, as in the original) when the rounds' lengths do not add up.

    Raises:
        UserError: placeholders and images do not match, roles do not alternate, or `max_length` cuts into an image.
    """
    form = get_template(template)
    turns = _alternating(conversation)
    found = sum(turn["value"].count(IMAGE) for turn in turns)
    if num_images is not None and found != num_images:
        raise UserError(f"the conversation has {found} {IMAGE} placeholders for {num_images} images")
    if form.style == "plain":
        ids, labels = _encode_plain(tokenizer, turns, form)
    else:
        prompt = render_conversation(images_first(turns), template)
        ids = _tokenize(tokenizer, prompt)
        labels = _mask(tokenizer, prompt, ids, form, max_length or tokenizer.model_max_length)
    image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE))  # type: ignore[arg-type]
    return _expand(ids, labels, image_token_id, num_image_tokens, max_length)


def _tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids with the tokenizer's special tokens in front, once, and `_PLACEHOLDER` for each image."""
    chunks = [list(tokenizer(chunk).input_ids) for chunk in prompt.split(IMAGE)]
    bos = int(bool(chunks[0]) and chunks[0][0] == tokenizer.bos_token_id)
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = [*ids, _PLACEHOLDER, *chunk[bos:]]
    return ids


def _encode_plain(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], form: Template) -> tuple[list[int], list[int]]:
    """The alignment stage: the image, then its caption. The human's words are dropped."""
    if len(turns) != 2 or IMAGE not in turns[0]["value"]:
        raise UserError(f"template plain: a sample is one human turn with {IMAGE} and one answer")
    ids = _tokenize(tokenizer, IMAGE + turns[1]["value"] + form.end)
    masked = len(_tokenize(tokenizer, IMAGE))
    return ids, [IGNORE_INDEX] * masked + ids[masked:]


def _mask(
    tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int], form: Template, max_length: int
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
        length = len(_tokenize(tokenizer, text)) + seams.round + shift
        instruction = len(_tokenize(tokenizer, parts[0] + seams.answer)) + seams.instruction + shift
        end = min(position + max(instruction, 0), len(labels))
        labels[position:end] = [IGNORE_INDEX] * (end - position)
        position += length
    labels[position:] = [IGNORE_INDEX] * len(labels[position:])
    # Where padding is the unknown token (Llama, Yi), the original does not count unknown tokens of the text either.
    total = sum(token != tokenizer.pad_token_id for token in ids)
    if position != total and position < max_length:
        log.warning("tokenization mismatch: rounds of %d tokens in a conversation of %d; no loss", position, total)
        return [IGNORE_INDEX] * len(ids)
    return labels


def _rounds(prompt: str, seams: _Seams) -> list[str]:
    pieces = prompt.split(seams.split)
    if not seams.paired:
        return pieces
    first = seams.split.join(pieces[:3])  # system, human, gpt
    return [first, *(seams.split.join(pieces[start : start + 2]) for start in range(3, len(pieces), 2))]


def _expand(
    ids: list[int], labels: list[int], image_token_id: int, num_image_tokens: int, max_length: int | None
) -> tuple[list[int], list[int]]:
    """Each placeholder becomes `num_image_tokens` image tokens without loss; then cut to `max_length`."""
    new_ids: list[int] = []
    new_labels: list[int] = []
    for token, label in zip(ids, labels, strict=True):
        if token == _PLACEHOLDER:
            new_ids += [image_token_id] * num_image_tokens
            new_labels += [IGNORE_INDEX] * num_image_tokens
        else:
            new_ids.append(token)
            new_labels.append(label)
    if max_length is not None:
        if image_token_id in new_ids[max_length:]:
            raise UserError(
                f"max_length {max_length} cuts into an image: {len(new_ids)} tokens, {num_image_tokens} an image"
            )
        new_ids, new_labels = new_ids[:max_length], new_labels[:max_length]
    return new_ids, new_labels
