"""Windowed and hierarchical models as users hold them: cut before, without their head, of a class of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layerfuse import create_encoder
from layerfuse.backbones import create_backbone
from tests.backbones.staged_zoo import CASES, SWIN, StagedCase

EACH_SMALL = pytest.mark.parametrize("case", [case for case in CASES if case.name != "mvitv2"], ids=str)


@EACH_SMALL
def test_a_second_backbone_counts_layers_as_the_model_was_built(case: StagedCase) -> None:
    model = case.model()
    case.backbone(model, layers=-2)
    with torch.no_grad():
        expected, found = case.backbone()(case.images()), case.backbone(model, layers=(1, 0))(case.images())
    for layer in (1, 0):
        torch.testing.assert_close(found.nchw(1 - layer), expected.nchw(layer), rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"layer {case.ends[-1]} is gone.* after block 1 of {case.ends[-1]}"):
        case.backbone(model, layers=-1)


@pytest.mark.parametrize(
    "case", [case for case in CASES if "transformers" not in case.name and case.name != "mvitv2"], ids=str
)
def test_a_model_whose_head_was_replaced_is_tapped(case: StagedCase) -> None:
    model: Any = case.model()
    model.head = nn.Identity()
    with torch.no_grad():
        expected, found = case.backbone(layers=-1)(case.images()), case.backbone(model, layers=-1)(case.images())
    torch.testing.assert_close(found.maps, expected.maps, rtol=0, atol=0)


def test_a_class_of_ones_own_on_top_of_timms_is_known() -> None:
    from timm.models.swin_transformer import SwinTransformer

    class Own(SwinTransformer):
        pass

    assert create_backbone("timm", Own(**SWIN), layers=-1).strides == ((16, 16),)


def test_maps_of_several_grids_are_told_how_to_come_to_one() -> None:
    advice = r"layers \(1, 3\) have 16x16, 8x8; tap layers of one grid.* take that are given in a list"
    with pytest.raises(ValueError, match=advice):
        create_encoder(CASES[0].model(), layers=(1, 3), fuser="concat")
    encoder = create_encoder([CASES[0].model()], layers=[(1, 3)], fuser="concat", resample="bilinear")
    assert encoder(CASES[0].images(2)).shape == (2, 256, 48)
