"""The model behind the service: requests in, answers out. Torch only, no Ray, no HTTP.

Shape suffixes: B requests of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pipelines.adapters.unmerged import with_adapter
from pipelines.mgm.load import load_model, load_processor
from pipelines.mgm.templates import in_order
from serve.sampling import Draw, Follow, Row
from serve.writing import Hear, Spoken, Writer

TOO_LONG = "context_length_exceeded"
"""OpenAI's code for a conversation that leaves no room for an answer."""
_REDUCED_FROM = 3
"""A picture this many times as large as the model's is shrunk by averaging whole pixels first: as Pillow's
`reducing_gap`, from where on the result cannot be told from that of one step."""
_SANITIZES: dict[str, Any] = (
    {"sanitize_control_tokens": True}
    if "sanitize_control_tokens" in signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    else {}
)
"""Text that spells a control token stays text from transformers 5.20 on; before, it is refused."""


@dataclass
class Request:
    """One conversation to continue.

    Attributes:
        messages: chat messages; `content` is a list of `{"type": "text", "text"}` and `{"type": "image"}` parts, whose
            order is the prompt's. Whatever a text spells is text.
        images: RGB pictures of the image parts, in reading order; or what `Engine.see` made of them.
        max_tokens: longest answer in tokens; one that the context cuts short is shorter.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        seed: of the drawing. The same request with the same seed gives the same answer in any batch.
        top_p, top_k: only the likeliest tokens are drawn; 1 and 0: all.
        presence_penalty, frequency_penalty: taken from the logits of tokens that the answer has already.
        stops: texts before which the answer ends.
        top_logprobs: tell the probability of each token, and of so many likeliest ones; None: of none.
    """

    messages: list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)
    max_tokens: int = 16
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0
    top_k: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass
class Answer:
    """What came of one request. `error` says why there is no text; the others of the batch are unaffected."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"
    error: str | None = None
    spoken: list[Spoken] = field(default_factory=list)


@dataclass
class Prepared:
    """Model inputs of one request: `input_ids` and `attention_mask` (1, T), `pixels` (pictures, 3, S, S) uint8; or the
    `error` instead, with OpenAI's `code` for it.

    Attributes:
        hear: gets the answer's text while it is made.
        wanted: false once nobody waits for the answer, which then costs no more.
        sent: what `hear` got so far.
    """

    request: Request
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    limit: int = 0
    error: str | None = None
    code: str | None = None
    hear: Hear | None = None
    wanted: bool = True
    sent: tuple[int, int] = (0, 0)

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt, visual tokens included."""
        return int(self.inputs["input_ids"].shape[1]) if self.inputs else 0


class Engine:
    """An MGM directory, ready to answer.

    Args:
        model: Hugging Face directory with processor and weights; merged, converted or quantized.
        adapter: what `captune train` wrote for it, to answer with unmerged.
        dtype: auto, float32, bfloat16 or float16.
        device: auto takes the GPU when there is one.

    Raises:
        UserError: the directory is no complete MGM, or the adapter does not fit it.
    """

    def __init__(
        self, model: Path | str, *, adapter: Path | str | None = None, dtype: str = "auto", device: str = "auto"
    ) -> None:
        self.device = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        self.processor = load_processor(model)
        self.tokenizer: PreTrainedTokenizerBase = self.processor.tokenizer
        self.model: Any = (
            with_adapter(Path(model), Path(adapter), dtype, self.device)
            if adapter
            else load_model(model, dtype, self.device)
        )
        config = self.model.config.get_text_config()
        self.context = int(config.max_position_embeddings)
        self.stop_ids = _stop_ids(self.tokenizer, self.model.generation_config.eos_token_id)
        self.chat_template = in_order(str(self.processor.chat_template))
        self.max_characters = self.context * _longest_piece(self.tokenizer)
        # Text that spells a control token is tokenized with another setting of the tokenizer than everything else.
        self._tokenizing = threading.Lock()
        self.broken = ""
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stop_ids[0]

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests, generated in one batch."""
        return self.generate([self.prepare(request) for request in requests])

    def see(self, picture: Image.Image) -> np.ndarray:
        """What the model sees of an RGB picture, (S, S, 3) uint8: all that has to be kept of it."""
        processor = self.processor.image_processor
        if (factor := max(picture.size) // (_REDUCED_FROM * processor.image_size_aux)) > 1:
            picture = picture.reduce(factor)
        return np.asarray(processor.square(picture))

    def try_picture(self) -> str:
        """Why this model answers no question about a picture; empty when it does."""
        picture = Image.new("RGB", (8, 8))
        content = [{"type": "image"}, {"type": "text", "text": "ready"}]
        return self.answer([Request([{"role": "user", "content": content}], [picture], max_tokens=1)])[0].error or ""

    def prepare(self, request: Request) -> Prepared:
        """Tokens and pixels of one request: CPU work for any thread, so that the model's thread only generates."""
        try:
            prepared = Prepared(request, self._inputs(request))
        # The request decides what template and image processor run into; its batch must not pay for it.
        except Exception as error:
            return Prepared(
                request, error=f"the request cannot be prepared for the model: {type(error).__name__}: {error}"
            )
        prepared.limit = min(request.max_tokens, self.context - prepared.prompt_tokens)
        if prepared.limit < 1:
            prepared.code = TOO_LONG
            prepared.error = (
                f"the prompt has {prepared.prompt_tokens} tokens with its pictures; the model's context of "
                f"{self.context} leaves no room for an answer"
            )
        return prepared

    def generate(self, batch: Sequence[Prepared]) -> list[Answer]:
        """One batched generation of all requests that could be prepared and that somebody waits for; the others keep
        their error.
        """
        sound = [index for index, prepared in enumerate(batch) if prepared.error is None and prepared.wanted]
        answers = [Answer(error=prepared.error) for prepared in batch]
        for index, answer in zip(sound, self._generate([batch[index] for index in sound]), strict=True):
            answers[index] = answer
        return answers

    @torch.inference_mode()
    def likelihoods(self, requests: Sequence[Request], answers: Sequence[str]) -> list[float]:
        """Log-likelihood of one answer to each request, up to its end token: how probable it is that the model says
        this and nothing else.

        Returns:
            Natural logarithms, sums over the answer's tokens, at most 0.

        Raises:
            ValueError: a request that cannot be prepared, or an answer that leaves no token.
        """
        found = []
        for request, answer in zip(requests, answers, strict=True):
            asked = self.prepare(request)
            if asked.error is not None:
                raise ValueError(asked.error)
            said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            whole = self._inputs(replace(request, messages=[*request.messages, said]), answered=True)
            found.append((Prepared(request, whole), self._answer_tokens(asked.inputs, whole)))
            if found[-1][0].prompt_tokens > self.context:
                raise ValueError(f"prompt and answer are longer than the model's context of {self.context}")
        inputs = self._collate([prepared for prepared, _ in found])
        longest = max(length for _, length in found)
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        logits_BTV = self.model(**inputs, use_cache=False, logits_to_keep=longest + 1).logits.float()
        chosen_BT = inputs["input_ids"][:, -longest:, None]
        scores_BT = torch.log_softmax(logits_BTV[:, :-1], dim=-1).gather(2, chosen_BT)[..., 0].cpu()
        return [
            float(row[longest - length :].double().sum()) for row, (_, length) in zip(scores_BT, found, strict=True)
        ]

    def _answer_tokens(self, asked: dict[str, torch.Tensor], whole: dict[str, torch.Tensor]) -> int:
        """How many tokens at the end are the answer: those that the conversation has beyond the prompt; what a template
        writes behind the first end token is cut off in place.
        """
        prompt, ids = asked["input_ids"][0].tolist(), whole["input_ids"][0].tolist()
        alike = next((place for place, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1]), None)
        begin = len(prompt) if alike is None else alike
        end = next((place + 1 for place in range(begin, len(ids)) if ids[place] in self.stop_ids), len(ids))
        for key in ("input_ids", "attention_mask"):
            whole[key] = whole[key][:, :end]
        if end <= begin:
            raise ValueError("the answer is empty")
        return end - begin

    def _inputs(self, request: Request, answered: bool = False) -> dict[str, torch.Tensor]:
        if not _SANITIZES:
            _refuse_control_tokens(request, self.tokenizer)
        with self._tokenizing:
            ids: list[int] = self.tokenizer.apply_chat_template(
                request.messages,
                chat_template=self.chat_template,
                add_generation_prompt=not answered,
                tokenize=True,
                return_dict=False,
                **_SANITIZES,
            )  # type: ignore[assignment]
        image, found = self.processor.image_token_id, len(request.images)
        if ids.count(image) != found:
            raise ValueError(f"{found} pictures for {ids.count(image)} places in the prompt")
        many = self.processor.num_image_tokens
        ids = [each for token in ids for each in ([token] * many if token == image else [token])]
        input_ids = torch.tensor([ids])
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        # Bytes, not floats: a quarter of the memory while it waits, and the device normalizes faster.
        return inputs | ({"pixels": self.processor.image_processor.resize(request.images)} if found else {})

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Prepared]) -> list[Answer]:
        if not batch:
            return []
        rows = [self._row(prepared) for prepared in batch]
        try:
            inputs = self._collate(batch)
            prompt_length = inputs["input_ids"].shape[1]
            self.model.generate(
                **inputs,
                do_sample=False,  # drawing happens in `Draw`, per request
                num_beams=1,
                max_new_tokens=max(prepared.limit for prepared in batch),
                eos_token_id=self.stop_ids,
                pad_token_id=self.pad_id,
                logits_processor=[Draw(rows, prompt_length, self.device)],
                stopping_criteria=[Follow(rows, self.device)],
            )
        # One request may be more than the device holds, or something that the model cannot take: find it by halves.
        except Exception as error:
            for prepared, row in zip(batch, rows, strict=True):
                prepared.sent = row.writer.sent
            if len(batch) == 1:
                return [self._failed(batch[0], error)]
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            half = len(batch) // 2
            return self._generate(batch[:half]) + self._generate(batch[half:])
        return [self._read(prepared, row.writer) for prepared, row in zip(batch, rows, strict=True)]

    def _row(self, prepared: Prepared) -> Row:
        request = prepared.request
        writer = Writer(self.tokenizer, self.stop_ids, request.stops, prepared.limit, prepared.hear, prepared.sent)
        return Row(request, writer, lambda: prepared.wanted)

    def _failed(self, prepared: Prepared, error: Exception) -> Answer:
        if isinstance(error, torch.OutOfMemoryError):
            said = "the request needs more memory than the device has"
        else:
            said = f"the model cannot answer this request: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            if self.device.type == "cuda" and "CUDA error" in str(error):
                self.broken = said  # no later work on this device can succeed
        return Answer(prompt_tokens=prepared.prompt_tokens, error=said)

    def _collate(self, batch: Sequence[Prepared]) -> dict[str, torch.Tensor]:
        """Left-pads what is per token; stacks pictures (rows without have none) and normalizes them on the device."""
        longest = max(prepared.prompt_tokens for prepared in batch)

        def padded(key: str, fill: int) -> torch.Tensor:
            rows = [prepared.inputs[key] for prepared in batch]
            rows = [torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=fill) for row in rows]
            return torch.cat(rows).to(self.device)

        inputs = {"input_ids": padded("input_ids", self.pad_id), "attention_mask": padded("attention_mask", 0)}
        pixels = [prepared.inputs["pixels"] for prepared in batch if "pixels" in prepared.inputs]
        if pixels:
            values, aux = self.processor.image_processor.normalize(torch.cat(pixels).to(self.device))
            inputs |= {"pixel_values": values.to(self.model.dtype), "pixel_values_aux": aux.to(self.model.dtype)}
        return inputs

    def _read(self, prepared: Prepared, writer: Writer) -> Answer:
        prepared.sent = writer.sent
        return Answer(
            text=writer.text,
            prompt_tokens=prepared.prompt_tokens,
            completion_tokens=writer.count,
            finish_reason=writer.finish_reason or "length",
            spoken=writer.spoken,
        )


def _refuse_control_tokens(request: Request, tokenizer: PreTrainedTokenizerBase) -> None:
    for part in (part for message in request.messages for part in message["content"] if part["type"] == "text"):
        if found := next((token for token in tokenizer.all_special_tokens if token in part["text"]), None):
            raise ValueError(f"the text holds {found}, which is a control token of the model")


def _longest_piece(tokenizer: PreTrainedTokenizerBase) -> int:
    """Most characters of text that one token stands for."""
    return max(len(piece) for piece in tokenizer.get_vocab() if piece not in tokenizer.all_special_tokens)


def _stop_ids(tokenizer: PreTrainedTokenizerBase, configured: int | list[int] | None) -> list[int]:
    """Everything that ends an answer: the model's own end tokens and the end of a chat turn."""
    ids = {tokenizer.eos_token_id} | set(configured if isinstance(configured, list) else [configured])
    for turn in ("<end_of_turn>", "<|eot_id|>", "<|im_end|>"):
        if turn in tokenizer.get_vocab():
            ids.add(tokenizer.convert_tokens_to_ids(turn))
    return sorted(token for token in ids if token is not None)
