"""The numbers of the original code, recorded once, must come out of the converted checkpoint (1e-4 in float32)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from pipelines.mgm import register
from pipelines.mgm.modeling import MGMForConditionalGeneration

register()
PLACEHOLDER = -200


@pytest.fixture(scope="module")
def model(converted: Path) -> MGMForConditionalGeneration:
    model, info = AutoModelForImageTextToText.from_pretrained(converted, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def expand(reference: dict[str, torch.Tensor], model: MGMForConditionalGeneration) -> tuple[torch.Tensor, torch.Tensor]:
    """The original's one placeholder an image -> one image token a visual token, padded on the right."""
    rows = []
    for ids, mask in zip(reference["input_ids"], reference["attention_mask"], strict=True):
        row = []
        for token in ids[mask.bool()].tolist():
            image = token == PLACEHOLDER
            row += [model.config.image_token_id] * model.config.num_image_tokens if image else [token]
        rows.append(torch.tensor(row))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids, mask


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_image_features(model: MGMForConditionalGeneration, reference: dict[str, torch.Tensor]) -> None:
    close(
        model.get_image_features(reference["pixel_values"], reference["pixel_values_aux"]), reference["image_features"]
    )


def test_merged_embeddings_before_gemmas_scaling(
    model: MGMForConditionalGeneration, reference: dict[str, torch.Tensor]
) -> None:
    ids, mask = expand(reference, model)
    places = ids == model.config.image_token_id
    text = model.get_input_embeddings()(ids.masked_fill(places, 0))
    features = model.get_image_features(reference["pixel_values"], reference["pixel_values_aux"])
    merged = model.model.merge_image_features(text, places, features) / model.config.text_config.hidden_size**0.5
    close(merged[mask.bool()], reference["inputs_embeds"][mask.bool()])


def test_logits_and_loss(model: MGMForConditionalGeneration, reference: dict[str, torch.Tensor]) -> None:
    ids, mask = expand(reference, model)
    assert torch.equal(mask, reference["merged_mask"])
    out = model(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=reference["pixel_values"],
        pixel_values_aux=reference["pixel_values_aux"],
        labels=reference["merged_labels"],
    )
    close(out.logits[mask.bool()], reference["logits"][mask.bool()])
    close(out.loss, reference["loss"][0])


def test_greedy_tokens(model: MGMForConditionalGeneration, reference: dict[str, torch.Tensor]) -> None:
    ids, mask = expand(reference, model)
    length = reference["generated"].shape[1]
    for row in range(len(ids)):
        prompt = ids[row][mask[row].bool()].unsqueeze(0)
        out = model.generate(
            input_ids=prompt,
            pixel_values=reference["pixel_values"][row : row + 1],
            pixel_values_aux=reference["pixel_values_aux"][row : row + 1],
            max_new_tokens=length,
            do_sample=False,
        )
        assert out[0, prompt.shape[1] :].tolist() == reference["generated"][row].tolist()
