"""The numbers of the original code, recorded once, must come out of the converted checkpoint (1e-4 in float32)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from pipelines.mgm import register
from pipelines.mgm.convert import convert_checkpoint, export_original
from pipelines.mgm.image_processing import MGMImageProcessor
from pipelines.mgm.modeling import MGMForConditionalGeneration

from . import original_cases as cases
from .original_cases import PLACEHOLDER, Case

register()


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


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_variants_of_the_checkpoint(case: Case, reference: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Several images a row, text-only rows, HD, Llama and Mixtral: as the original code gave them
    (record_original.py).
    """
    recorded = load_file(cases.DATA / "cases.safetensors")
    expected = {
        name.removeprefix(f"{case.name}."): t for name, t in recorded.items() if name.startswith(f"{case.name}.")
    }
    checkpoint = cases.write_checkpoint(case, tmp_path / "original")
    convert_checkpoint(checkpoint, tmp_path / "hf")
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info.values()), info
    model.eval()
    image, tokens = model.config.image_token_id, model.config.num_image_tokens

    def expand(row: list[int], values: list[int], visual: int) -> list[int]:
        """`values`, one for each token of `row`, with `visual` as often as an image has tokens."""
        pairs = zip(row, values, strict=True)
        return [v for token, value in pairs for v in ([visual] * tokens if token == PLACEHOLDER else [value])]

    aux = reference["pixel_values_aux"]
    views = MGMImageProcessor.from_config(model.config).views(aux)
    features = model.get_image_features(views, aux)
    close(features, expected["image_features"])

    ids = [expand(row, row, image) for row in cases.ROWS]
    labels = [expand(row, own, -100) for row, own in zip(cases.ROWS, cases.labels_of(cases.ROWS), strict=True)]
    batch, mask = cases.padded(ids), cases.padded([[1] * len(row) for row in ids])
    out = model(
        input_ids=batch,
        attention_mask=mask,
        pixel_values=views,
        pixel_values_aux=aux,
        labels=cases.padded(labels, -100),
    )
    close(out.logits[mask.bool()][::8], expected["logits"])
    close(out.loss, expected["loss"][0])
    places = batch == image
    text = model.get_input_embeddings()(batch.masked_fill(places, 0))
    merged = model.model.merge_image_features(text, places, features) / model.model.text_scale
    close(merged[mask.bool()][::8], expected["inputs_embeds"])

    for row, (start, end) in enumerate([(0, 2), (2, 3), (3, 3)]):
        pixels = {"pixel_values": views[start:end], "pixel_values_aux": aux[start:end]} if end > start else {}
        length = len(ids[row])
        prompt = torch.tensor([ids[row]])
        new = model.generate(
            input_ids=prompt, **pixels, max_new_tokens=cases.NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        assert new[0, length:].tolist() == expected["generated"][row].tolist()

    export_original(tmp_path / "hf", tmp_path / "back")
    before, after = (load_file(place / "model.safetensors") for place in (checkpoint, tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
