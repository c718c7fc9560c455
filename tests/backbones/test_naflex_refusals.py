"""Batches of patches that do not fit together, or not the model: each is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch

import layerfuse
from layerfuse.preprocessing import PatchBatch
from tests.backbones.naflex_support import LAYERS, build, pictures, tapped
from tests.backbones.zoo import CASES, timm_model


def siglip2_mapping(**changed: Any) -> dict[str, Any]:
    mapping = {
        "pixel_values": torch.zeros(2, 6, 768),
        "pixel_attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]]),
        "spatial_shapes": torch.tensor([[2, 3], [2, 2]]),
    }
    return {key: value for key, value in {**mapping, **changed}.items() if value is not None}


def timm_mapping(**changed: Any) -> dict[str, Any]:
    places = [[row, column] for row in range(2) for column in range(3)]
    smaller = [[row, column] for row in range(2) for column in range(2)]
    mapping = {
        "patches": torch.zeros(2, 6, 768),
        "patch_coord": torch.tensor([places, [*smaller, [0, 0], [0, 0]]]),
        "patch_valid": torch.tensor([[True] * 6, [True] * 4 + [False] * 2]),
    }
    return {key: value for key, value in {**mapping, **changed}.items() if value is not None}


def test_the_mappings_that_the_refusals_change_are_taken() -> None:
    grids = ((2, 3), (2, 2))
    five_axes = timm_mapping(patches=torch.zeros(2, 6, 16, 16, 3))
    for mapping in (siglip2_mapping(), timm_mapping(), siglip2_mapping(input_ids=torch.zeros(2, 4)), five_axes):
        assert PatchBatch.from_mapping(mapping).grids == grids
        assert [features.grids[0] for features in tapped("timm")(mapping)] == list(grids)


MASK = [[1] * 6, [1, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            siglip2_mapping(spatial_shapes=None),
            "holds 'pixel_values', 'pixel_attention_mask' and lacks 'spatial_shapes'",
        ),
        (siglip2_mapping(pixel_attention_mask=None), "lacks 'pixel_attention_mask'; give the whole output of SigLIP 2"),
        (timm_mapping(patch_valid=None), "holds 'patches', 'patch_coord' and lacks 'patch_valid'"),
        (timm_mapping(attn_mask=torch.zeros(1)), "has its own 'attn_mask'; patches are masked by 'patch_valid' alone"),
        (
            siglip2_mapping(pixel_attention_mask=torch.tensor([MASK[0], [1, 1, 1, 0, 0, 0]])),
            "picture 1 has a grid of 2x2 patches, and the mask lets 3 of 6 through; they have to be as many",
        ),
        (
            siglip2_mapping(pixel_attention_mask=torch.tensor([MASK[0], [1, 1, 0, 1, 1, 0]])),
            "picture 1 has a grid of 2x2 patches, which are not in place: they stand in front",
        ),
        (
            siglip2_mapping(spatial_shapes=torch.tensor([[2, 4], [2, 2]])),
            "picture 0 has a grid of 2x4 patches, and the",
        ),
        (siglip2_mapping(spatial_shapes=torch.tensor([[-2, -3], [2, 2]])), "picture 0 has a grid of -2x-3 patches"),
        (
            siglip2_mapping(spatial_shapes=torch.tensor([[2, 3]])),
            r"'spatial_shapes' \(1, 2\); expected .* and \(2, 2\)",
        ),
        (siglip2_mapping(pixel_values=torch.zeros(2, 3, 32, 48)), r"'pixel_values' .* shape \(2, 3, 32, 48\)"),
        (
            siglip2_mapping(pixel_values=torch.zeros(2, 6, 588)),
            "patches have 588 values; this backbone takes 768: patches",
        ),
        (siglip2_mapping(pixel_values=torch.zeros(2, 6, 768).long()), "patches are torch.int64 of shape"),
        (
            timm_mapping(patch_coord=timm_mapping()["patch_coord"].flip(1)),
            "picture 0 has a grid of 2x3 patches, which are not in place",
        ),
        (
            timm_mapping(patch_coord=timm_mapping()["patch_coord"] * 2),
            "picture 0 has a grid of 3x5 patches, and the mask lets 6 of 6 through; .* Was the picture cut off",
        ),
        (timm_mapping(patch_valid=torch.zeros(2, 6, dtype=torch.bool)), "picture 0 has a grid of 0x0 patches"),
    ],
)
@pytest.mark.parametrize("kind", ["transformers", "timm"])
def test_batches_that_do_not_fit_are_refused(kind: str, mapping: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tapped(kind)(mapping)


def test_lists_in_a_mapping_are_refused() -> None:
    with pytest.raises(TypeError, match=r"'spatial_shapes' .* is a list; give tensors: processor\(images, return_ten"):
        tapped("timm")(siglip2_mapping(spatial_shapes=[[2, 3], [2, 2]]))


@pytest.mark.parametrize(
    ("patches", "grids", "message"),
    [
        (torch.zeros(2, 6, 768), ((2, 3),), "patches are of 2 pictures, and 1 grids were given"),
        (torch.zeros(1, 6, 768), ((2, 4),), "picture 0 has a grid of 2x4 patches, more than the 6 that are there"),
        (torch.zeros(1, 6, 768), ((0, 4),), "the grid of picture 0 is"),
        (torch.zeros(0, 6, 768), (), "with at least one picture"),
    ],
)
def test_batches_that_cannot_be_are_refused(patches: torch.Tensor, grids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchBatch(patches, grids)


def test_pictures_that_cannot_be_prepared_are_refused() -> None:
    backbone = tapped("timm")
    for number in (0, 2.5, "9"):
        with pytest.raises(ValueError, match=f"max_num_patches={number!r} holds no picture; give 1 or more"):
            backbone.prepare_patches(pictures(), max_num_patches=number)
    with pytest.raises(ValueError, match="asked for of no pictures"):
        backbone.prepare_patches([])


def others() -> list[Any]:
    clip = next(case for case in CASES if str(case) == "transformers-clip")
    names = ("naflexvit_base_patch16_gap", "vit_tiny_patch16_224")
    fixed = [
        timm.create_model(name, embed_dim=32, depth=3, num_heads=2, **how)
        for name, how in zip(names, ({"embed_proj_type": "conv"}, {}), strict=True)
    ]
    return [clip.model(), *fixed]


@pytest.mark.parametrize("batch", [siglip2_mapping(), timm_mapping(), PatchBatch(torch.zeros(1, 6, 768), ((2, 3),))])
def test_models_that_take_no_patches_refuse_them(batch: Any) -> None:
    for model in others():
        encoder = layerfuse.create_encoder(model, layers=LAYERS, fuser="average")
        with pytest.raises(ValueError, match=f"{type(model).__name__} takes images as one tensor.*take a NaFlex model"):
            encoder(batch)
        with pytest.raises(ValueError, match=f"{type(model).__name__} takes images of one size and no patches; make"):
            encoder.prepare_patches(pictures())


@pytest.mark.parametrize("libraries", [("timm", "transformers"), ("timm",)])
def test_a_group_of_backbones_takes_no_patches(libraries: tuple[str, ...]) -> None:
    group = layerfuse.create_backbone_group([build(library) for library in libraries], layers=1)
    with pytest.raises(ValueError, match="a group of backbones takes images of one size and no patches"):
        group.prepare_patches(pictures())
    for batch in (siglip2_mapping(), PatchBatch(torch.zeros(1, 6, 768), ((2, 3),))):
        for images in (batch, (batch,) * len(libraries)):
            with pytest.raises(TypeError, match="patches are for one backbone that takes them"):
                group(images)


def test_maps_of_images_are_not_to_be_had_of_patches() -> None:
    encoder = layerfuse.create_encoder(build("timm"), layers=LAYERS, fuser="average")
    batch: Any = siglip2_mapping()
    with pytest.raises(ValueError, match=r"maps are of images of one size; of patches unfold each"):
        encoder.backbone.maps(batch)
    with pytest.raises(ValueError, match=r"a map is of images of one size; of patches"):
        encoder.maps(batch)


def test_patches_without_their_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="patches without their grids; give the whole output of the processor"):
        tapped("transformers")(torch.zeros(2, 6, 768))


def test_dropped_patches_are_refused() -> None:
    model = timm_model("naflexvit_so400m_patch16_siglip", patch_drop_rate=0.5)()
    backbone = layerfuse.create_backbone(model, layers=1).train()
    with pytest.raises(ValueError, match="Tokens were dropped on the way"):
        backbone(timm_mapping())
