"""Windowed and hierarchical models: maps of several grids and widths, equal to those of the library."""

from __future__ import annotations

import pytest
import torch

from layerfuse.backbones import backbone_from_config
from tests.backbones.staged_zoo import CASES, StagedCase

EACH = pytest.mark.parametrize("case", CASES, ids=str)
# timm builds no small MViTv2.
EACH_SMALL = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case.name == "mvitv2" else []) for case in CASES],
)


@EACH
def test_maps_equal_the_librarys_bit_for_bit(case: StagedCase) -> None:
    model, images = case.model(), case.images()
    with torch.no_grad():
        expected = case.library(model, images)
        assert set(case.ends) <= set(expected)
        features = case.backbone(model)(images)
        for layer, expected_map in expected.items():
            torch.testing.assert_close(features.nchw(layer), expected_map, rtol=0, atol=0, msg=f"layer {layer}")


@EACH
def test_widths_strides_and_grids_are_known_without_running(case: StagedCase) -> None:
    backbone = case.backbone()
    assert backbone.num_blocks == sum(case.depths)
    assert backbone.map_channels == case.of_layers(case.widths)
    strides = case.of_layers(case.strides)
    assert backbone.strides == tuple((stride, stride) for stride in strides)
    assert backbone.grids(case.size) == tuple((case.size // stride,) * 2 for stride in strides)
    with torch.no_grad():
        features = backbone(case.images(1))
    assert (features.grids, features.channels) == (backbone.grids(case.size), backbone.map_channels)
    assert features.prefix == ()


@EACH_SMALL
def test_a_cut_model_runs_and_has_no_unused_parameter(case: StagedCase) -> None:
    expected = case.backbone()(case.images())
    for depth in sorted({0, 1, case.ends[0], case.ends[-1] - 1}):
        backbone = case.backbone(layers=depth)
        features = backbone(case.images())
        torch.testing.assert_close(features.maps[0], expected.maps[depth], rtol=0, atol=0)
        features.maps[0].square().sum().backward()
        unused = [name for name, weight in backbone.named_parameters() if weight.grad is None]
        assert not unused, f"cut at {depth}"
        assert len(backbone.blocks) == max(depth, 1)


@EACH_SMALL
def test_a_config_builds_the_same_model_again(case: StagedCase) -> None:
    backbone = case.backbone(layers=(0, case.ends[0], -2))
    again = backbone_from_config(backbone.config).eval()
    again.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again(case.images()).maps, backbone(case.images()).maps, rtol=0, atol=0)
    assert (again.strides, again.map_channels) == (backbone.strides, backbone.map_channels)


@EACH_SMALL
def test_a_digest_is_that_of_the_layer_wherever_the_model_is_cut(case: StagedCase) -> None:
    whole = case.backbone().layer_digests()
    assert len(set(whole.values())) == len(whole)
    for depth in (0, case.ends[0], case.ends[-1] - 1):
        assert case.backbone(layers=depth).layer_digests() == {depth: whole[depth]}


@EACH_SMALL
def test_checkpointed_blocks_have_the_same_maps_and_gradients(case: StagedCase) -> None:
    found = []
    for checkpoint in (False, True):
        backbone = case.backbone(layers=(1, -1))
        backbone.set_gradient_checkpointing(checkpoint)
        backbone.train()
        features = backbone(case.images().requires_grad_())
        sum(tokens.square().sum() for tokens in features).backward()
        found.append([*features.maps, *(weight.grad for weight in backbone.parameters())])
    torch.testing.assert_close(found[0], found[1])
