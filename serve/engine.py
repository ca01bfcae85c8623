"""The model behind the service: requests in, answers out. Torch only, no Ray, no HTTP.

Shape suffixes: B requests of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import LogitsProcessor, StoppingCriteria
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from pipelines.adapters.unmerged import with_adapter
from pipelines.mgm.load import load_model, load_processor


@dataclass
class Request:
    """One conversation to continue.

    Attributes:
        messages: chat messages; `content` is a list of `{"type": "text", "text"}` and `{"type": "image"}` parts.
        images: decoded RGB pictures of the image parts, in reading order.
        max_tokens: longest answer in tokens.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        seed: of the drawing. The same request with the same seed gives the same answer in any batch.
    """

    messages: list[dict[str, Any]]
    images: list[Image] = field(default_factory=list)
    max_tokens: int = 16
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Answer:
    """What came of one request. `error` says why there is no text; the others of the batch are unaffected."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"
    error: str | None = None


@dataclass
class Prepared:
    """Model inputs of one request, `input_ids` (1, T) and what else the processor gave; or the `error` instead."""

    request: Request
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    error: str | None = None

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
        # The first use of a fast tokenizer changes its settings; later ones, from several threads, then only read.
        self.prepare(Request([{"role": "user", "content": [{"type": "text", "text": "ready"}]}]))
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stop_ids[0]

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests, generated in one batch."""
        return self.generate([self.prepare(request) for request in requests])

    def prepare(self, request: Request) -> Prepared:
        """Tokens and pixels of one request: CPU work for any thread, so that the model's thread only generates."""
        try:
            inputs = self._inputs(request)
        # The request decides what template and image processor run into; its batch must not pay for it.
        except Exception as error:
            return Prepared(
                request, error=f"the request cannot be prepared for the model: {type(error).__name__}: {error}"
            )
        prepared = Prepared(request, inputs)
        if prepared.prompt_tokens + request.max_tokens > self.context:
            prepared.error = (
                f"the prompt has {prepared.prompt_tokens} tokens; with max_tokens {request.max_tokens} "
                f"it exceeds the model's context of {self.context}"
            )
        return prepared

    def generate(self, batch: Sequence[Prepared]) -> list[Answer]:
        """One batched generation of all requests that could be prepared; the others keep their error."""
        sound = [index for index, prepared in enumerate(batch) if prepared.error is None]
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
        messages = copy.deepcopy(request.messages)
        pictures = iter(request.images)
        marker = getattr(self.processor, "image_token", None)
        for part in (part for message in messages for part in message["content"]):
            if part["type"] == "image":
                part["image"] = next(pictures)
            elif marker and marker in part["text"]:
                raise ValueError(f"the text holds {marker}, which stands for a picture; send pictures as image parts")
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=not answered, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return dict(inputs)

    @torch.inference_mode()
    def _generate(self, batch: Sequence[Prepared]) -> list[Answer]:
        if not batch:
            return []
        try:
            inputs = self._collate(batch)
            limits = [prepared.request.max_tokens for prepared in batch]
            prompt_length = inputs["input_ids"].shape[1]
            output_BT = self.model.generate(
                **inputs,
                do_sample=False,  # drawing happens in `_Draw`, per request
                num_beams=1,
                max_new_tokens=max(limits),
                eos_token_id=self.stop_ids,
                pad_token_id=self.pad_id,
                logits_processor=[_Draw([prepared.request for prepared in batch], self.device)],
                stopping_criteria=[_Limits(limits, prompt_length, self.device)],
            )
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                return [
                    Answer(
                        prompt_tokens=batch[0].prompt_tokens, error="the request needs more memory than the device has"
                    )
                ]
            torch.cuda.empty_cache()
            half = len(batch) // 2
            return self._generate(batch[:half]) + self._generate(batch[half:])
        rows = output_BT[:, prompt_length:].tolist()
        return [self._read(prepared, row) for prepared, row in zip(batch, rows, strict=True)]

    def _collate(self, batch: Sequence[Prepared]) -> dict[str, torch.Tensor]:
        """Left-pads what is per token; stacks what is per picture (rows without pictures have none)."""
        longest = max(prepared.prompt_tokens for prepared in batch)
        merged: dict[str, torch.Tensor] = {}
        for key in dict.fromkeys(key for prepared in batch for key in prepared.inputs):
            tensors = [prepared.inputs[key] for prepared in batch if key in prepared.inputs]
            if tensors[0].shape == batch[0].inputs["input_ids"].shape and tensors[0].ndim == 2:
                fill = self.pad_id if key == "input_ids" else 0
                tensors = [torch.nn.functional.pad(t, (longest - t.shape[1], 0), value=fill) for t in tensors]
            value = torch.cat(tensors)
            if value.is_floating_point():
                value = value.to(self.model.dtype)
            merged[key] = value.to(self.device)
        return merged

    def _read(self, prepared: Prepared, row: list[int]) -> Answer:
        """Text of one row: up to its first stop token or its own limit, whichever came first."""
        limit = prepared.request.max_tokens
        row = row[:limit]
        end = next((place for place, token in enumerate(row) if token in self.stop_ids), None)
        tokens = row if end is None else row[:end]
        return Answer(
            text=str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip(),
            prompt_tokens=prepared.prompt_tokens,
            completion_tokens=len(row) if end is None else end + 1,
            finish_reason="length" if end is None else "stop",
        )


def _stop_ids(tokenizer: PreTrainedTokenizerBase, configured: int | list[int] | None) -> list[int]:
    """Everything that ends an answer: the model's own end tokens and the end of a chat turn."""
    ids = {tokenizer.eos_token_id} | set(configured if isinstance(configured, list) else [configured])
    for turn in ("<end_of_turn>", "<|eot_id|>", "<|im_end|>"):
        if turn in tokenizer.get_vocab():
            ids.add(tokenizer.convert_tokens_to_ids(turn))
    return sorted(token for token in ids if token is not None)


class _Draw(LogitsProcessor):
    """Draws per request: adding Gumbel noise to logits / temperature makes the maximum a sample of the softmax.

    Every request has its own generator, so that its answer does not depend on which requests share its batch.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self.rows = [
            (row, request.temperature, torch.Generator().manual_seed(request.seed))
            for row, request in enumerate(requests)
            if request.temperature > 0
        ]
        self.device = device

    def __call__(self, input_ids: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        for row, temperature, generator in self.rows:
            # On the CPU, so that a seed means the same on every device.
            uniform_V = torch.rand(scores_BV.shape[1], generator=generator, dtype=torch.float64)
            gumbel_V = -torch.log(-torch.log(uniform_V.clamp(1e-20, 1 - 1e-16)))
            scores_BV[row] = (scores_BV[row].double() / temperature + gumbel_V.to(self.device)).to(scores_BV.dtype)
        return scores_BV


class _Limits(StoppingCriteria):
    """Ends each row at its own `max_tokens`, so that a batch of short answers does not wait for nothing."""

    def __init__(self, limits: Sequence[int], prompt_length: int, device: torch.device) -> None:
        self.limits_B = torch.tensor(limits, device=device)
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] - self.prompt_length >= self.limits_B
