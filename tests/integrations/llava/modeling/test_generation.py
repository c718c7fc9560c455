"""`generate` with images: encoded once, in front, or given encoded; repeated prompt by prompt for beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from integrations.llava.inference.predictor import Predictor
from integrations.llava.modeling.generation import _images_per_text

GREEDY = {"max_new_tokens": 6, "do_sample": False}


def batch_of(predictor: Predictor, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    samples = [predictor.prepare(images, "What?") for images in (pictures[:2], None, pictures[2])]
    batch: dict[str, torch.Tensor] = predictor.collate(samples)
    return batch


def encoded_of(predictor: Predictor, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    features = predictor.model.get_image_features(batch["pixel_values"])
    rest = {name: own for name, own in batch.items() if name not in ("pixel_values", "image_sizes")}
    return {**rest, "mm_encoder_outputs": {"image": features}}


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_encoded_images_give_the_answers_of_pixels(
    predictor: Predictor, pictures: list[Image.Image], options: dict[str, Any]
) -> None:
    batch = batch_of(predictor, pictures)
    expected = predictor.model.generate(**batch, **GREEDY, **options)

    given = encoded_of(predictor, batch)
    assert torch.equal(predictor.model.generate(**given, **GREEDY, **options), expected)
    assert given["mm_encoder_outputs"]["image"].pooler_output  # the caller's stay


def test_encoded_images_give_the_logits_of_pixels(predictor: Predictor, pictures: list[Image.Image]) -> None:
    batch = batch_of(predictor, pictures)

    assert torch.equal(predictor.model(**encoded_of(predictor, batch)).logits, predictor.model(**batch).logits)


def test_embedded_prompts_find_their_images_by_the_image_tokens_embedding(
    predictor: Predictor, pictures: list[Image.Image]
) -> None:
    batch, options = batch_of(predictor, pictures), GREEDY | {"num_beams": 2}
    expected = predictor.model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    embeds = predictor.model.get_input_embeddings()(batch.pop("input_ids"))

    assert torch.equal(predictor.model.generate(inputs_embeds=embeds, **batch, **options), expected)


def test_images_are_given_once(predictor: Predictor, pictures: list[Image.Image]) -> None:
    batch = batch_of(predictor, pictures)
    both = {**encoded_of(predictor, batch), "pixel_values": batch["pixel_values"]}

    for call in (predictor.model.generate, predictor.model):
        with pytest.raises(ValueError, match="the images twice; give one"):
            call(**both)


def test_the_first_step_computes_the_logits_of_the_last_position_alone(
    predictor: Predictor, pictures: list[Image.Image]
) -> None:
    positions: list[int] = []
    hook = predictor.model.lm_head.register_forward_pre_hook(lambda _, given: positions.append(given[0].shape[1]))
    predictor.model.generate(**batch_of(predictor, pictures), **GREEDY)
    hook.remove()

    assert set(positions) == {1}


def test_images_are_divided_among_texts_by_their_tokens() -> None:
    tokens = [1, 3, 4, 4]

    assert _images_per_text([4, 0, 4, 4], tokens) == [2, 0, 1, 1]
    assert _images_per_text([0], []) == [0]
    for wrong in ([4, 4], [3, 5, 4], [4, 4, 4, 4], [13]):
        with pytest.raises(ValueError, match=r"image tokens, which are not those of their 4 images, \[1, 3, 4, 4\]"):
            _images_per_text(wrong, tokens)
