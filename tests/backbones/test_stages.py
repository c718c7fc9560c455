"""Windowed and hierarchical models: maps of several grids and widths, equal to those of the library."""

from __future__ import annotations

import copy

import pytest
import torch

from layerfuse.backbones import backbone_from_config, create_backbone
from layerfuse.testing import random_images
from tests.backbones.staged_zoo import CASES, SWIN, StagedCase, timm_model

EACH = pytest.mark.parametrize("case", CASES, ids=str)
# timm builds no small MViTv2.
EACH_SMALL = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case.name == "mvitv2" else []) for case in CASES],
)


def compiles(case: StagedCase) -> list[pytest.MarkDecorator]:
    """One model of each layout is compiled in every run."""
    return [] if case.name in ("hiera", "sam", "transformers-vitdet") else [pytest.mark.slow]


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
    if case.name == "transformers-sam2_hiera":
        with pytest.raises(ValueError, match="transformers has no gradient checkpointing for Sam2HieraDetModel"):
            case.backbone(layers=1).set_gradient_checkpointing()
        return
    found = []
    for checkpoint in (False, True):
        backbone = case.backbone(layers=(1, -1))
        backbone.set_gradient_checkpointing(checkpoint)
        backbone.train()
        features = backbone(case.images().requires_grad_())
        sum(tokens.square().sum() for tokens in features).backward()
        found.append([*features.maps, *(weight.grad for weight in backbone.parameters())])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("case", [pytest.param(each, id=str(each), marks=compiles(each)) for each in CASES])
def test_a_compiled_and_an_exported_backbone_have_the_same_maps(case: StagedCase) -> None:
    torch._dynamo.reset()
    backbone, images = case.backbone(layers=(0, 1, -1)), case.images()
    with torch.no_grad():
        expected = backbone(images)
        compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")(images)
        exported = torch.export.export(backbone, (images,)).module()(images)
    for found in (compiled, exported):
        assert (found.grids, found.layers) == (expected.grids, expected.layers)
        torch.testing.assert_close(found.maps, expected.maps)


def case_of(name: str) -> StagedCase:
    return next(case for case in CASES if case.name == name)


@pytest.mark.parametrize("name", ["swin", "swinv2"])
def test_a_resized_swin_is_timms_own(name: str) -> None:
    model = case_of(name).model()
    expected_model = copy.deepcopy(model)
    expected_model.set_input_size(img_size=(96, 128))
    images = random_images(1, size=(96, 128))
    backbone = create_backbone(model, layers=(2, 4, 6), options={"image_size": (96, 128)})
    with torch.no_grad():
        expected = expected_model.forward_intermediates(images, intermediates_only=True)
        torch.testing.assert_close(list(backbone.maps(images)), expected, rtol=0, atol=0)
    assert backbone.grids() == ((24, 32), (12, 16), (6, 8))
    again = backbone_from_config(backbone.config)
    again.load_state_dict(backbone.state_dict())


def test_a_dynamic_swin_rounds_the_edges_of_its_grids_up() -> None:
    model = timm_model("swin_tiny_patch4_window7_224", **SWIN, dynamic_img_size=True)().eval()
    images = random_images(1, size=(44, 60))
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True)
        found = create_backbone(model, layers=(2, 4, 6)).maps(images)
    torch.testing.assert_close(list(found), expected, rtol=0, atol=0)
    assert [tuple(each.shape[2:]) for each in found] == [(11, 15), (6, 8), (3, 4)]


def test_a_swin_of_transformers_has_its_own_windows_whatever_ran_before() -> None:
    case = case_of("transformers-swin")
    used, images = case.model(), random_images(1, size=96)
    used(random_images(1, size=64))  # shrinks the windows of the last stage
    with torch.no_grad():
        expected = case.library(case.model(), images)
        backbone = create_backbone(used, layers=(2, 4, 6), options={"image_size": 96})
        for layer, found in zip((2, 4, 6), backbone.maps(images), strict=True):
            torch.testing.assert_close(found, expected[layer], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("swin", 32, "takes only 64x64; prepare.*image_size="),
        ("hiera", 32, "takes only 64x64"),
        ("transformers-swin", 128, "takes only 64x64; prepare.*image_size="),
        ("transformers-sam", 32, "takes only 64x64"),
        ("transformers-hiera", 48, "takes multiples of 32x32 pixels.*the nearest is 64x64"),
        ("sam2_hiera", 100, "takes multiples of 32x32 pixels.*the nearest is 96x96"),
        ("sam", 40, "takes multiples of its patch size 16x16 pixels"),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_those_that_can(name: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case_of(name).backbone()(random_images(1, size=size))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("transformers-swin", 32, "at least 49 pixels; give another image_size, or tap earlier layers"),
        ("transformers-sam", 32, "SamVisionEncoder takes only 64x64"),
        ("transformers-hiera", 40, "image_size 40x40 is no multiple of 32x32; take for example 32x32"),
        ("swin", 30, "image_size 30x30 is no multiple of the patch size 4x4"),
    ],
)
def test_a_model_is_not_built_for_a_size_that_cannot_be(name: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_backbone(case_of(name).model(), layers=-1, options={"image_size": size})
