"""Pixels of eight bits and sizes on the host give the same tokens; what is frozen before all that learns is free."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from integrations.llava.modeling import FusedLlavaForConditionalGeneration, set_trainable
from layerfuse.backbones import create_backbone
from tests.integrations.llava.modeling.test_anyres import SIZES, fused
from tests.integrations.llava.modeling.test_anyres import inputs as tiled_inputs
from tests.integrations.llava.modeling.test_model import BACKBONES, inputs, labels, make_model
from tests.integrations.llava.tiny_parts import tiny_clip


@pytest.fixture
def model() -> FusedLlavaForConditionalGeneration:
    return make_model(*BACKBONES["timm CLIP"])


def test_pixels_of_eight_bits_are_normalised_by_the_model(model: FusedLlavaForConditionalGeneration) -> None:
    batch = inputs(model)
    pixels = torch.randint(0, 256, batch["pixel_values"].shape, dtype=torch.uint8)
    prepared = model.model.vision_tower.backbone.preprocessing.normalize(pixels)
    with torch.no_grad():
        expected = model(**(batch | {"pixel_values": prepared})).logits
        assert torch.equal(model(**(batch | {"pixel_values": pixels})).logits, expected)


def test_tiles_of_eight_bits_and_sizes_that_stay_on_the_host_give_the_same_tokens() -> None:
    backbone = create_backbone(tiny_clip(), layers=(1, 2, 3, 4))
    model, given = fused(backbone, "concat"), tiled_inputs()
    pixels = torch.randint(0, 256, given["pixel_values"].shape, dtype=torch.uint8)
    sizes = given["image_sizes"]
    prepared = model.model.vision_tower.backbone.preprocessing.normalize(pixels)
    with torch.no_grad():
        expected = model.model.get_image_features(prepared, image_sizes=sizes).pooler_output
        found = model.model.get_image_features(pixels, image_sizes=list(SIZES)).pooler_output
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("trained", "with_graph"),
    [
        (("fuser", "projector"), {"fuser", "projector", "llm"}),
        (("projector",), {"projector", "llm"}),
        (("llm",), {"embedding", "llm"}),
        (("backbone",), {"backbone", "fuser", "projector", "llm"}),
    ],
)
def test_what_is_frozen_in_front_of_all_that_learns_builds_no_graph(
    trained: tuple[str, ...], with_graph: set[str], model: FusedLlavaForConditionalGeneration
) -> None:
    set_trainable(model, trained)
    inner, found = model.train().model, {}

    def note(part: str, output: Any) -> None:
        tensors = list(output) if part == "backbone" else [output[0] if part == "llm" else output]
        found[part] = any(tensor.requires_grad for tensor in tensors)

    parts = {
        "backbone": inner.vision_tower,
        "fuser": inner.fuser,
        "projector": inner.multi_modal_projector,
        "embedding": model.get_input_embeddings(),
        "llm": inner.language_model,
    }
    for name, part in parts.items():
        part.register_forward_hook(lambda _, __, output, name=name: note(name, output))
    model(**inputs(model), labels=labels(model))

    assert {part for part, has in found.items() if has} == with_graph
    assert found.keys() == parts.keys()
