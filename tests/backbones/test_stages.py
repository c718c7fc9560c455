"""Windowed and hierarchical models: maps of several grids and widths, equal to those of the library."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from layerfuse import FusedEncoder, create_encoder, tap
from layerfuse.backbones import Backbone, BackboneGroup, backbone_from_config, create_backbone
from layerfuse.dense import SegmentationEncoder, ViTEncoder
from layerfuse.errors import TapError
from layerfuse.features import Grid
from layerfuse.pyramid import FeaturePyramid, PyramidEncoder
from layerfuse.testing import random_images, tiny_backbone
from tests.backbones.staged_zoo import CASES, SWIN, StagedCase, timm_model

EACH = pytest.mark.parametrize("case", CASES, ids=str)
# timm builds no small MViTv2.
EACH_SMALL = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case.name == "mvitv2" else []) for case in CASES],
)


def compiles(case: StagedCase) -> list[pytest.MarkDecorator]:
    """One model is compiled in every run."""
    return [] if case.name == "hiera" else [pytest.mark.slow]


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


def swin(layers: tuple[int, ...] = (2, 4, 6)) -> Backbone:
    return case_of("swin").backbone(layers=layers)


def test_stages_are_the_levels_of_a_pyramid_each_from_its_own_stride() -> None:
    backbone, images = swin(), case_of("swin").images()
    maps = backbone.maps(images)
    plain = PyramidEncoder(backbone, strides=(4, 8, 16), out_channels=None)
    assert plain.channels == (16, 32, 64)
    for level, found in zip(plain(images), maps, strict=True):
        torch.testing.assert_close(level, found, rtol=0, atol=0)
    learned = PyramidEncoder(backbone, strides=(4, 8, 16), out_channels=8)
    assert [len(scale) for scale in learned.pyramid.scale] == [0, 0, 0]  # nothing to double or halve
    assert [tuple(level.shape[1:]) for level in learned(images)] == [(8, 16, 16), (8, 8, 8), (8, 4, 4)]
    coarse = PyramidEncoder(swin((2, 3, 4, 6)), out_channels=8)  # strides 4, 8, 8, 16 for 4, 8, 16, 32
    assert [len(scale) for scale in coarse.pyramid.scale] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="patch_size has 3 pairs for 4 strides"):
        FeaturePyramid(8, patch_size=backbone.strides)


def test_decoders_read_the_stages() -> None:
    backbone = swin((2, 4, 6))
    encoder = ViTEncoder(backbone)
    assert (encoder.output_strides, encoder.out_channels) == ([4, 8, 16], [16, 32, 64])
    segmentation = SegmentationEncoder(backbone, depth=4, width=None)
    assert segmentation.out_channels == [3, 0, 16, 32, 64]
    shapes = [tuple(level.shape[1:]) for level in segmentation(case_of("swin").images())]
    assert shapes[2:] == [(16, 16, 16), (32, 8, 8), (64, 4, 4)]


@pytest.mark.parametrize(
    ("fuser", "options", "grid"),
    [("concat", {"resize": "bilinear"}, (16, 16)), ("spatial_aggregator", {"grid": (4, 4)}, (4, 4))],
)
def test_fusers_read_maps_of_several_grids_and_widths(fuser: str, options: dict[str, Any], grid: Grid) -> None:
    encoder = create_encoder(swin((6, 4, 2)).model, layers=(6, 4, 2), fuser=fuser, fuser_options=options)
    images = case_of("swin").images()
    assert encoder.backbone.fuser_channels == [64, 32, 16]
    assert encoder.grid() == grid
    assert encoder.maps(images).shape == (len(images), encoder.out_channels, *grid)


def test_a_fuser_of_one_grid_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="needs one grid for all maps"):
        create_encoder(case_of("sam2_hiera").model(), layers=(1, 3), fuser="concat")


def test_a_group_has_the_strides_of_its_backbones() -> None:
    members = [swin((2, 6)), tiny_backbone(layers=(1, 3), image_size=64, patch_size=16)]
    group = BackboneGroup(members, resample=None, order=(2, 0, 1, 3))
    assert group.strides == ((16, 16), (4, 4), (16, 16), (16, 16))
    assert group.map_channels == (32, 16, 64, 32)
    images = group.prepare([Image.new("RGB", (80, 64))])
    features = group(images)
    assert (features.grids, features.channels) == (group.grids(), group.map_channels)
    assert features.grids == ((4, 4), (16, 16), (4, 4), (4, 4))
    resampled = BackboneGroup(members, grid=(8, 8))
    assert resampled.strides == ((8, 8),) * 4
    assert resampled.grids() == resampled(images).grids == ((8, 8),) * 4


def test_a_frozen_encoder_is_saved_and_loaded(tmp_path: Path) -> None:
    options = {"resize": "bilinear"}
    encoder = create_encoder(case_of("swin").model(), layers=(6, 2), fuser="concat", fuser_options=options)
    encoder.freeze_backbone().save_pretrained(tmp_path)
    again = FusedEncoder.from_pretrained(tmp_path)
    images = case_of("swin").images()
    torch.testing.assert_close(again(images), encoder(images), rtol=0, atol=0)


def test_layers_are_shares_of_the_depth_across_stages_and_negative() -> None:
    assert case_of("swin").backbone(layers=(0.5, -1, 0)).layers == (3, 6, 0)


def test_what_one_stage_does_to_its_own_blocks_is_refused_and_what_leads_to_the_next_is_not() -> None:
    """Between stages patches are merged; inside one every block must receive what the one before put out."""
    model = case_of("swin").model()
    backbone = create_backbone(model, layers=(2, 3))
    backbone(case_of("swin").images())
    model = case_of("swin").model()
    model.layers[1].blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with pytest.raises(TapError, match="what block 3 puts out is not what block 4 receives"):
        create_backbone(model, layers=(2, 4))(case_of("swin").images())


def test_the_block_before_the_border_is_watched_where_the_deepest_is_the_first_of_its_stage() -> None:
    model = case_of("swin").model()
    model.layers[0].blocks[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    with pytest.raises(TapError, match="what block 1 puts out is not what block 2 receives"):
        create_backbone(model, layers=3)(case_of("swin").images())


def test_a_model_that_was_cut_in_an_early_stage_counts_its_blocks_as_it_was_built() -> None:
    model = case_of("swin").model()
    create_backbone(model, layers=3)
    assert create_backbone(model, layers=(1, 2)).num_blocks == 6
    with pytest.raises(ValueError, match=r"layer 6 is gone: .* cut it after block 2 of 6"):
        create_backbone(model, layers=-1)


def test_tap_takes_the_blocks_of_all_stages() -> None:
    model, images = case_of("swin").model(), case_of("swin").images()
    with tap(model, layers=(2, -1), blocks="layers.*.blocks") as tapped:
        model(images)
    assert [tuple(states.shape[1:]) for states in tapped.hidden_states] == [(16, 16, 16), (4, 4, 64)]
    with pytest.raises(ValueError, match=r"has no stages at 'stages', so 'stages\.\*\.blocks' names no block lists"):
        tap(model, layers=1, blocks="stages.*.blocks")


class TwoStages(nn.Module):
    """A module of one's own: two stages of convolutions over (B, C, H, W), with a merging layer behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 4, 4)
        self.stages = nn.ModuleList(nn.ModuleDict({"blocks": blocks(width), "merge": merge(width)}) for width in (4, 8))
        self.head = nn.Linear(16, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        image = self.embed(images)
        for stage in self.stages:
            for block in stage["blocks"]:
                image = block(image)
            image = stage["merge"](image)
        return image.mean((2, 3))


def blocks(width: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))


def merge(width: int) -> nn.Module:
    return nn.Conv2d(width, 2 * width, 2, 2)


OWN: dict[str, Any] = {
    "blocks": "stages.*.blocks",
    "embed_dim": 4,
    "num_prefix_tokens": 0,
    "patch_size": 4,
    "image_size": 32,
    "tail": ["head", "stages.*.merge"],
    "stages": [
        {"num_blocks": 2, "embed_dim": 4, "stride": 4, "layout": "NCHW"},
        {"num_blocks": 2, "embed_dim": 8, "stride": (8, 8), "layout": "NCHW"},
    ],
}


@pytest.mark.parametrize("deepest", [1, 2, 3, 4])
def test_a_module_of_ones_own_has_stages_too(deepest: int) -> None:
    torch.manual_seed(0)
    model, images = TwoStages(), random_images()
    with torch.no_grad():
        image = expected = model.embed(images)
        for number, block in enumerate([block for stage in model.stages for block in stage["blocks"]], 1):
            image = model.stages[0]["merge"](image) if number == 3 else image
            image = block(image)
            expected = image if number == deepest else expected
    backbone = create_backbone(model, layers=deepest, options=OWN)
    (found,) = backbone.maps(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.square().sum().backward()
    assert all(weight.grad is not None for weight in backbone.parameters())
    assert backbone.strides == (((4, 4),) if deepest < 3 else ((8, 8),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": OWN["stages"][:1]}, "the stages have 2 = 2 blocks, and the model has 4"),
        ({"embed_dim": 8}, "those of the first stage, and that has width 4 and stride"),
        ({"num_prefix_tokens": 1}, "no place for prefix tokens; give 0, or the layout 'NLC'"),
        ({"stages": [{**OWN["stages"][0], "layout": "NCWH"}]}, "layout 'NCWH' is unknown; did you mean 'NCHW'"),
        ({"stages": [{**OWN["stages"][0], "width": 4}]}, "field of a stage 'width' is unknown"),
        ({"stages": [{"embed_dim": 4}]}, "a stage needs num_blocks, embed_dim and stride; missing: num_blocks, stride"),
        ({"stages": [{**OWN["stages"][0], "num_blocks": 0}]}, "a stage has 0 blocks of width 4"),
        ({"stages": ["NCHW"]}, "a stage is a str; give a mapping with num_blocks"),
        ({"blocks": "steps.*.blocks"}, "TwoStages has no stages at 'steps', so"),
    ],
)
def test_stages_that_cannot_be_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        create_backbone(TwoStages(), layers=(1, 3), options={**OWN, **change})


def test_a_layout_that_does_not_fit_is_told_from_the_shapes() -> None:
    stages = [{**stage, "layout": "NHWC"} for stage in OWN["stages"]]
    backbone = create_backbone(TwoStages(), layers=1, options={**OWN, "stages": stages})
    with pytest.raises(TapError, match=r"\(2, 4, 8, 8\); expected \(B, H, W, C\) = \(2, 8, 8, 4\).*Check layout"):
        backbone(random_images())
