"""Feature pyramids: levels of strides 4 to 32 from maps of one stride, learned and resampled."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional as F

from layerfuse import FusedEncoder, create_fuser
from layerfuse.pyramid import FeaturePyramid, PyramidEncoder, resample_pyramid
from layerfuse.testing import random_images, randomise_parameters, tiny_backbone


def shapes(maps: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    return [tuple(level.shape[1:]) for level in maps]


def layer_norm(image: torch.Tensor, weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    mean = image.mean(1, keepdim=True)
    spread = (image - mean).square().mean(1, keepdim=True)
    scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return (image - mean) / (spread + 1e-6).sqrt() * scale[:, None, None] + shift[:, None, None]


def as_published(image: torch.Tensor, pyramid: FeaturePyramid, level: int) -> torch.Tensor:
    """ViTDet's levels of strides 4, 8, 16 and 32, from the paper's text, with the weights of ours."""
    scale = dict(pyramid.scale[level].state_dict())
    if level == 0:
        image = F.conv_transpose2d(image, scale["0.weight"], scale["0.bias"], stride=2)
        image = F.gelu(layer_norm(image, scale, "1"))
        image = F.conv_transpose2d(image, scale["3.weight"], scale["3.bias"], stride=2)
    elif level == 1:
        image = F.conv_transpose2d(image, scale["0.weight"], scale["0.bias"], stride=2)
    elif level == 3:
        image = F.max_pool2d(image, 2, 2)
    project = dict(pyramid.project[level].state_dict())
    image = layer_norm(F.conv2d(image, project["0.weight"]), project, "1")
    return layer_norm(F.conv2d(image, project["2.weight"], padding=1), project, "3")


def test_a_pyramid_over_patches_of_16_pixels_is_vitdets() -> None:
    pyramid = randomise_parameters(FeaturePyramid(32, 12), std=0.3)
    image = torch.randn(2, 32, 4, 6)
    levels = pyramid(image, (64, 96))
    assert shapes(levels) == [(12, 16, 24), (12, 8, 12), (12, 4, 6), (12, 2, 3)]
    for level, ours in enumerate(levels):
        torch.testing.assert_close(ours, as_published(image, pyramid, level), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("patch", "grid", "size"),
    [
        (14, (16, 12), (224, 168)),
        (8, (4, 6), (32, 48)),
        (32, (2, 3), (64, 96)),
        (16, (3, 5), (48, 80)),
        (14, (3, 3), 50),
    ],
)
def test_levels_have_the_strides_asked_for_whatever_the_patch_size(
    patch: int, grid: tuple[int, int], size: int | tuple[int, int]
) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    maps = torch.randn(1, 16, *grid)
    expected = [(-(-height // stride), -(-width // stride)) for stride in (4, 8, 16, 32)]
    for levels in (FeaturePyramid(16, 8, patch_size=patch)(maps, size), resample_pyramid(maps, size)):
        assert [tuple(level.shape[2:]) for level in levels] == expected


def test_a_level_reads_the_map_of_its_own() -> None:
    maps = [torch.full((1, width, 4, 4), float(width)) for width in (3, 4, 5)]
    levels = resample_pyramid(maps, 32, strides=(4, 8, 16))
    assert shapes(levels) == [(3, 8, 8), (4, 4, 4), (5, 2, 2)]
    assert [float(level.mean()) for level in levels] == [3, 4, 5]
    learned = FeaturePyramid((3, 4, 5), 6, patch_size=8, strides=(4, 8, 16))
    assert shapes(learned(maps, 32)) == [(6, 8, 8), (6, 4, 4), (6, 2, 2)]


def test_resampling_averages_the_cells_that_a_coarser_one_covers() -> None:
    image = torch.arange(16.0).view(1, 1, 4, 4)
    (coarse,) = resample_pyramid(image, 64, strides=(32,))
    torch.testing.assert_close(coarse, F.avg_pool2d(image, 2))
    (same,) = resample_pyramid(image, 64, strides=(16,))
    assert same is image


def test_a_pyramid_stands_behind_a_backbone_and_behind_a_fuser() -> None:
    backbone = tiny_backbone(layers=(0, 1, 2, 3), image_size=64, patch_size=16)
    images = random_images(1, size=64)
    plain = PyramidEncoder(backbone, out_channels=None)
    assert plain.channels == (32,) * 4
    torch.testing.assert_close(plain(images), resample_pyramid(backbone.maps(images), 64))
    fused = FusedEncoder(backbone, create_fuser("concat", in_channels=32, num_layers=4)).freeze_backbone()
    learned = PyramidEncoder(fused, out_channels=8).train()
    levels = learned(images)
    assert shapes(levels) == [(8, 16, 16), (8, 8, 8), (8, 4, 4), (8, 2, 2)]
    sum(level.square().sum() for level in levels).backward()
    assert all(weight.grad is not None for weight in learned.pyramid.parameters())
    assert all(weight.grad is None for weight in backbone.parameters())


def test_a_pyramid_computes_in_bfloat16_and_compiles() -> None:
    pyramid = FeaturePyramid(16, 8, patch_size=14)
    image = torch.randn(1, 16, 8, 8)
    compiled = torch.compile(lambda maps: pyramid(maps, 112), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), pyramid(image, 112), rtol=1e-5, atol=1e-5)
    assert {level.dtype for level in pyramid.bfloat16()(image.bfloat16(), 112)} == {torch.bfloat16}


def test_what_makes_no_pyramid_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.zeros(1, 32, 4, 4)
    with pytest.raises(ValueError, match=r"strides are \(8, 4\); give whole numbers of pixels, from fine to coarse"):
        resample_pyramid(image, 64, strides=(8, 4))
    with pytest.raises(ValueError, match="was given 2 maps; give one for all levels, or one for each"):
        FeaturePyramid(32)([image, image], 64)
    with pytest.raises(ValueError, match=r"in_channels are 2 numbers for 4 strides"):
        FeaturePyramid((32, 32))
    backbone = tiny_backbone(layers=(1, 2))
    with pytest.raises(ValueError, match="taps 2 layers for 4 strides .*tap one layer for all of them, or one"):
        PyramidEncoder(backbone)
    with pytest.raises(TypeError, match="encoder is a Linear; give a backbone"):
        PyramidEncoder(torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    encoder = FusedEncoder(backbone, create_fuser("average", in_channels=32, num_layers=2))
    monkeypatch.setattr(type(encoder.fuser), "out_grid", lambda self, grids: None)
    with pytest.raises(ValueError, match="fuser 'average' lie on no grid, so they make no pyramid"):
        PyramidEncoder(encoder)
