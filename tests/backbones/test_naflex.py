"""Padded batches of pictures of several grids: against the libraries' own hidden states, loaders and processors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils import _pytree as pytree
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

import layerfuse
from layerfuse.preprocessing import PatchBatch
from layerfuse.preprocessing.naflex import size_for_patches
from layerfuse.testing import randomise_parameters
from tests.backbones.naflex_support import (
    GRIDS,
    LAYERS,
    MODELS,
    NUM_PATCHES,
    build,
    images_of,
    pictures,
    processed,
    tapped,
)
from tests.backbones.zoo import NUM_BLOCKS


def their_hidden_states(model: Any, batch: Mapping[str, Any]) -> list[torch.Tensor]:
    """Layers 1 to NUM_BLOCKS, each (B, P + N, C)."""
    if "spatial_shapes" in batch:
        return list(model(**batch, output_hidden_states=True).hidden_states)[1:]
    found = model.forward_intermediates(batch, return_prefix_tokens=True, intermediates_only=True, output_fmt="NLC")
    return [torch.cat([item[1], item[0]], dim=1) if isinstance(item, tuple) else item for item in found]


@pytest.mark.parametrize("kind", MODELS)
def test_a_padded_batch_gives_the_librarys_hidden_states_on_each_pictures_grid(kind: str) -> None:
    model = build(kind)
    backbone = layerfuse.create_backbone(model, layers=LAYERS, copy=True)
    batch = processed(backbone)
    with torch.no_grad():
        expected = their_hidden_states(model, batch)
        found = backbone(batch)
    assert [features.grids for features in found] == [(grid,) * 3 for grid in GRIDS]
    prefix = backbone.num_prefix_tokens
    for place, features in enumerate(found):
        rows, columns = GRIDS[place]
        for position, layer in ((1, 1), (2, NUM_BLOCKS)):
            states = expected[layer - 1][place : place + 1]
            torch.testing.assert_close(features[position], states[:, prefix : prefix + rows * columns], rtol=0, atol=0)
            if prefix:
                torch.testing.assert_close(features.prefix[position], states[:, :prefix], rtol=0, atol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_a_padded_batch_gives_what_each_picture_gives_alone(kind: str) -> None:
    backbone = tapped(kind)
    batch = backbone.prepare_patches(pictures(), max_num_patches=NUM_PATCHES)
    with torch.no_grad():
        for image, features in zip(images_of(batch, backbone.patch_layout), backbone(batch), strict=True):
            alone = backbone(image)
            assert alone.grids == features.grids
            torch.testing.assert_close(features.maps, alone.maps, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(features.prefix, alone.prefix, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["transformers", "timm", "timm channels first"])
def test_prepared_patches_are_those_of_the_librarys_processor(kind: str) -> None:
    backbone = tapped(kind)
    ours = backbone.prepare_patches(pictures(), max_num_patches=NUM_PATCHES)
    theirs = processed(backbone)
    assert ours.grids == GRIDS
    names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
    found: tuple[torch.Tensor, ...] = (ours.patches, ours.mask, ours.spatial_shapes)
    if kind != "transformers":
        names = ("patches", "patch_valid", "patch_coord")
        found = (ours.patches, ours.mask, ours.coordinates)
    expected = [torch.as_tensor(theirs[name]) for name in names]
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-6)
    assert torch.equal(found[1], expected[1].bool())
    assert torch.equal(found[2], expected[2])
    parsed = PatchBatch.from_mapping(theirs)
    assert parsed.grids == GRIDS
    assert torch.equal(parsed.patches, theirs[names[0]])


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    patch_size=st.sampled_from((14, 16, 32)),
    max_num_patches=st.sampled_from((1, 7, 64, 256, 1024)),
)
def test_sizes_are_those_of_both_libraries(height: int, width: int, patch_size: int, max_num_patches: int) -> None:
    size = size_for_patches((height, width), (patch_size, patch_size), max_num_patches)
    assert size == get_image_size_for_max_num_patches(height, width, patch_size, max_num_patches)
    assert (size[0] // patch_size) * (size[1] // patch_size) <= max_num_patches


def test_as_many_patches_as_the_native_size_has_are_prepared_unless_told() -> None:
    backbone = tapped("transformers")
    batch = backbone.prepare_patches(pictures()[1])
    assert (batch.grids, tuple(batch.patches.shape)) == (((3, 3),), (1, 9, 768))
    assert backbone.to(torch.bfloat16).prepare_patches(pictures()[1]).patches.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["transformers", "timm"])
def test_padding_changes_nothing_and_gets_no_gradient(kind: str) -> None:
    backbone = tapped(kind)
    batch = backbone.prepare_patches(pictures(), max_num_patches=NUM_PATCHES + 3)
    noise = torch.where(batch.mask[..., None], batch.patches, torch.randn_like(batch.patches))
    noise.requires_grad_()
    with torch.no_grad():
        expected = backbone(batch)
    found = backbone(PatchBatch(noise, batch.grids))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.maps, theirs.maps, rtol=1e-6, atol=1e-6)
    sum(features[-1].square().mean() for features in found).backward()
    assert noise.grad is not None
    reached = noise.grad.abs().sum(dim=2) > 0
    assert torch.equal(reached, batch.mask)
    learnt = [name for name, weight in backbone.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert [name for name in learnt if "bias" not in name] == []


def test_gradients_of_a_padded_batch_are_those_of_its_pictures() -> None:
    encoder = layerfuse.create_encoder(build("transformers"), layers=LAYERS, fuser="concat")
    batch = encoder.prepare_patches(pictures(), max_num_patches=NUM_PATCHES)
    torch.stack([tokens.square().mean() for tokens in encoder(batch)]).sum().backward()
    found = {name: weight.grad for name, weight in encoder.named_parameters()}
    encoder.zero_grad()
    for image in images_of(batch, encoder.backbone.members[0].patch_layout):
        encoder(image).square().mean().backward()
    expected = {name: weight.grad for name, weight in encoder.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


FUSER_OPTIONS: dict[str, dict[str, Any]] = {
    "text_gated": {"condition_channels": 8, "groups": 3},
    "attention_pool": {"window": 1},
}


@pytest.mark.parametrize("fuser", layerfuse.list_fusers())
def test_every_fuser_takes_pictures_of_several_grids(fuser: str) -> None:
    options = FUSER_OPTIONS.get(fuser)
    encoder = layerfuse.create_encoder(build("transformers"), layers=(1, 2, 3), fuser=fuser, fuser_options=options)
    randomise_parameters(encoder.fuser, std=0.1)
    batch = encoder.prepare_patches(pictures(), max_num_patches=NUM_PATCHES)
    condition = torch.randn(5, 8) if fuser == "text_gated" else None
    with torch.no_grad():
        found = encoder(batch, condition)
        for place, image in enumerate(images_of(batch, "height width channels")):
            asked = None if condition is None else condition[place : place + 1]
            alone = encoder(image, asked)
            assert found[place].shape == (encoder.num_tokens(image.shape[2:]), encoder.out_channels)
            torch.testing.assert_close(found[place], alone[0], rtol=1e-5, atol=1e-5)


def test_pictures_of_one_grid_are_fused_in_one_call() -> None:
    encoder = layerfuse.create_encoder(build("transformers"), layers=LAYERS, fuser="average")
    sizes: list[int] = []
    encoder.fuser.register_forward_pre_hook(lambda _, args: sizes.append(args[0].batch_size))
    encoder(encoder.prepare_patches(pictures(), max_num_patches=NUM_PATCHES))
    assert sizes == [1, 2, 1, 1]


def test_as_many_conditions_as_pictures_are_needed() -> None:
    options = FUSER_OPTIONS["text_gated"]
    encoder = layerfuse.create_encoder(build("timm"), layers=LAYERS, fuser="text_gated", fuser_options=options)
    batch = encoder.prepare_patches(pictures(), max_num_patches=NUM_PATCHES)
    for condition, shown in (
        (torch.randn(4, 8), r"of shape \(4, 8\); it was built for \(B=5, D_c=8\)"),
        (torch.tensor(3.0), r"of shape \(\); it was built for \(B=5, D_c=8\)"),
        ([[0.0] * 8] * 5, "of type list"),
        (None, r"needs a condition, \(B=5, D_c=8\)"),
    ):
        with pytest.raises(ValueError, match=shown):
            encoder(batch, condition)


def test_extract_features_takes_a_processors_output() -> None:
    model = build("transformers")
    found = layerfuse.extract_features(model, processed(tapped("transformers")), layers=LAYERS)
    assert [features.grids[0] for features in found] == list(GRIDS)
    assert not found[0][0].requires_grad


def test_a_batch_of_patches_is_a_pytree_that_moves() -> None:
    batch = tapped("timm").prepare_patches(pictures(), max_num_patches=NUM_PATCHES)
    assert pytree.tree_map(lambda tensor: tensor + 1, batch).grids == batch.grids
    assert len(pytree.tree_leaves(batch)) == 1
    moved = batch.to("meta", torch.float16)
    assert (moved.patches.dtype, moved.mask.device.type, len(moved)) == (torch.float16, "meta", 5)


@pytest.mark.slow
def test_a_batch_of_patches_compiles() -> None:
    backbone = tapped("transformers")
    batch = backbone.prepare_patches(pictures(), max_num_patches=NUM_PATCHES)
    compiled: Any = torch.compile(backbone, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(batch)[2].maps, backbone(batch)[2].maps, rtol=1e-6, atol=1e-6)


def test_a_saved_encoder_takes_patches_as_before(tmp_path: Path) -> None:
    encoder = layerfuse.create_encoder(build("timm"), layers=LAYERS, fuser="average")
    encoder.save_pretrained(tmp_path)
    loaded = layerfuse.FusedEncoder.from_pretrained(tmp_path)
    batch = copy.deepcopy(encoder).prepare_patches(pictures(), max_num_patches=NUM_PATCHES)
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch), encoder(batch), rtol=0, atol=0)
