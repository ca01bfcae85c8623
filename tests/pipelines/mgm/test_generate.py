"""`generate` as for any multimodal model: batches, several images, caches, samples and beams, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CompileConfig

from pipelines.mgm.modeling import MGMForConditionalGeneration
from pipelines.mgm.processing import MGMProcessor

from .conftest import chat, noise_image

NEW = 6
# Several images, one, none, and lengths that differ: what a batch may mix.
CONVERSATIONS = [
    chat("What is written on the sign?", noise_image(0)),
    chat("Which of the two is red?", noise_image(1), noise_image(2, width=20, height=70)),
    chat("Hi"),
    chat("Describe the image.", noise_image(3)),
]


def inputs(processor: MGMProcessor, conversations: list[Any]) -> dict[str, torch.Tensor]:
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def answers(model: MGMForConditionalGeneration, batch: dict[str, torch.Tensor], **kwargs: Any) -> list[list[int]]:
    out = model.generate(**batch, max_new_tokens=NEW, min_new_tokens=NEW, **{"do_sample": False} | kwargs)
    return out[:, batch["input_ids"].shape[1] :].tolist()


def test_batch_with_left_padding_equals_one_by_one(model: MGMForConditionalGeneration, processor: MGMProcessor) -> None:
    batched = answers(model, inputs(processor, CONVERSATIONS))
    alone = [answers(model, inputs(processor, [conversation]))[0] for conversation in CONVERSATIONS]
    assert batched == alone
    assert len({tuple(answer) for answer in batched}) > 1  # the rows differ, so the test can fail


def test_batch_of_text_only(model: MGMForConditionalGeneration, processor: MGMProcessor) -> None:
    batch = inputs(processor, [chat("Hi"), chat("What is a bus?")])
    assert "pixel_values" not in batch
    assert len(answers(model, batch)) == 2


def test_answer_depends_on_the_image(model: MGMForConditionalGeneration, processor: MGMProcessor) -> None:
    first, second = (model(**inputs(processor, [chat("What?", noise_image(seed))])).logits[0, -1] for seed in (0, 1))
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("kwargs", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_other_caches_give_the_same_tokens(
    model: MGMForConditionalGeneration, processor: MGMProcessor, kwargs: dict[str, Any]
) -> None:
    batch = inputs(processor, CONVERSATIONS)
    assert answers(model, batch, **kwargs) == answers(model, batch)


def test_several_samples_keep_each_rows_images(model: MGMForConditionalGeneration, processor: MGMProcessor) -> None:
    """Expanding a batch in which rows have 1, 2 and 0 images must not mix them up; each image is encoded once."""
    batch = inputs(processor, CONVERSATIONS)
    ids, kwargs = model._expand_inputs_for_generation(
        expand_size=3, input_ids=batch["input_ids"], **{key: batch[key] for key in batch if key != "input_ids"}
    )
    features = model.get_image_features(batch["pixel_values"], batch["pixel_values_aux"])
    order = [0] * 3 + [1, 2] * 3 + [3] * 3
    assert "pixel_values" not in kwargs and len(ids) == 12
    torch.testing.assert_close(kwargs["image_features"], features[order])
    one = answers(model, batch, num_beams=2)
    assert one == [answers(model, inputs(processor, [c]), num_beams=2)[0] for c in CONVERSATIONS]
    sampled = model.generate(**batch, max_new_tokens=2, do_sample=True, num_return_sequences=2)
    assert sampled.shape[0] == 8


@pytest.mark.heavy
def test_decode_step_compiles_without_graph_breaks(model: MGMForConditionalGeneration, processor: MGMProcessor) -> None:
    batch = inputs(processor, CONVERSATIONS[:1])
    with torch.no_grad():
        prefill = model(**batch, use_cache=True)
        step = {
            "input_ids": prefill.logits[:, -1:].argmax(-1),
            "attention_mask": torch.ones(1, batch["input_ids"].shape[1] + 1, dtype=torch.long),
            "use_cache": False,
        }
        full = model(
            input_ids=torch.cat([batch["input_ids"], step["input_ids"]], 1),
            **{key: batch[key] for key in ("pixel_values", "pixel_values_aux")},
        ).logits[:, -1]
        compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
        decoded = compiled(past_key_values=prefill.past_key_values, **step).logits[:, -1]
    torch.testing.assert_close(decoded, full, atol=1e-4, rtol=1e-4)


def test_static_cache_decodes_with_one_compiled_graph(
    model: MGMForConditionalGeneration, processor: MGMProcessor
) -> None:
    """As `generate` does it on a GPU: no graph break (`fullgraph`), and every step after the first reuses its graph."""
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    settings = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    settings._compile_all_devices = True
    batch = inputs(processor, CONVERSATIONS)
    static = {"cache_implementation": "static"}
    assert answers(model, batch, **static, compile_config=settings) == answers(model, batch)
    assert len(graphs) == 1
    answers(model, batch, **static, compile_config=settings)
    assert len(graphs) == 1


def test_precomputed_image_features_stand_for_pixels(
    model: MGMForConditionalGeneration, processor: MGMProcessor
) -> None:
    batch = dict(inputs(processor, CONVERSATIONS))
    expected = answers(model, batch)
    batch["image_features"] = model.get_image_features(batch.pop("pixel_values"), batch.pop("pixel_values_aux"))
    assert answers(model, batch) == expected


def test_too_few_and_too_many_images_are_errors(model: MGMForConditionalGeneration, processor: MGMProcessor) -> None:
    batch = dict(inputs(processor, CONVERSATIONS))
    for wrong in (batch["pixel_values"][:2], batch["pixel_values"].repeat(2, 1, 1, 1)):
        aux = torch.zeros(len(wrong), 3, 64, 64)
        with pytest.raises(ValueError, match="image tokens"):
            model(**batch | {"pixel_values": wrong, "pixel_values_aux": aux})
    del batch["pixel_values"], batch["pixel_values_aux"]
    with pytest.raises(ValueError, match="no images were given"):
        model(**batch)
    with pytest.raises(ValueError, match="pixel_values_aux must be"):
        model(**inputs(processor, CONVERSATIONS[:1]) | {"pixel_values_aux": torch.zeros(1, 3, 60, 60)})


def test_prompts_over_the_context_length_are_errors(
    model: MGMForConditionalGeneration, processor: MGMProcessor
) -> None:
    """Inputs made without the processor: the model knows its limit, before and during generation."""
    batch = inputs(processor, CONVERSATIONS[:1])
    length = batch["input_ids"].shape[1]
    model.config.text_config.max_position_embeddings = length
    assert model(**batch).logits.shape[1] == length
    model.config.text_config.max_position_embeddings = length - 1
    message = f"prompt is {length} tokens long with its images, over the model's context of {length - 1}"
    with pytest.raises(ValueError, match=message):
        model(**batch)
    with pytest.raises(ValueError, match=message):
        model.generate(**batch, max_new_tokens=1)
