"""Any number of input channels: forward, preprocessing with statistics of their own, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import layerfuse
from layerfuse.backbones import Backbone, OpenClipBackbone
from layerfuse.preprocessing import HALF, Preprocessing
from layerfuse.testing import randomise_parameters
from tests.backbones.zoo import CASES, Case

CHANNELS = (1, 4, 6, 13)
TIMM = {"embed_dim": 32, "depth": 2, "num_heads": 2}
HUGGING_FACE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "timm:vit_base_patch16_siglip_224": {**TIMM, "img_size": 32},
    "timm:eva02_base_patch16_clip_224": {**TIMM, "img_size": 32},
    "timm:beit_base_patch16_224": {**TIMM, "img_size": 32},
    "timm:naflexvit_base_patch16_gap": {**TIMM, "pos_embed_grid_size": (2, 2)},
    "transformers:clip_vision_model": {**HUGGING_FACE, "image_size": 32, "intermediate_size": 64},
    "transformers:dinov2": {**HUGGING_FACE, "image_size": 32},
    "transformers:vit": {**HUGGING_FACE, "image_size": 32, "intermediate_size": 64},
    "transformers:siglip2_vision_model": {**HUGGING_FACE, "num_patches": 4, "intermediate_size": 64},
    "transformers:internvl_vision": {**HUGGING_FACE, "image_size": (32, 32), "intermediate_size": 64},
}


def build(name: str, channels: int) -> Backbone:
    option = "in_chans" if name.startswith("timm") else "num_channels"
    options = {**MODELS[name], option: channels}
    return layerfuse.create_backbone(name, layers=(1, 2), pretrained=False, options=options)


def array(channels: int, height: int = 50, width: int = 70) -> Any:
    return np.random.default_rng(channels).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [*CHANNELS, 3])
@pytest.mark.parametrize("name", MODELS)
def test_channels_are_those_of_the_option_and_prepared_with_their_statistics(name: str, channels: int) -> None:
    backbone = build(name, channels)
    assert backbone.in_channels == channels
    statistics = {"mean": (0.25,) * channels, "std": (0.5,) * channels}
    backbone.preprocessing = replace(backbone.preprocessing, **statistics)
    images = backbone.prepare([array(channels), torch.from_numpy(array(channels)).permute(2, 0, 1)])
    assert images.shape == (2, channels, 32, 32)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=0)
    assert backbone(images).grids == ((2, 2),) * 2
    rebuilt = layerfuse.backbones.backbone_from_config(backbone.config)
    assert (rebuilt.in_channels, rebuilt.preprocessing) == (channels, backbone.preprocessing)
    if backbone.patch_layout is not None:
        batch = backbone.prepare_patches(array(channels), max_num_patches=6)
        assert backbone(batch)[0].grids == ((2, 3),) * 2


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", MODELS)
def test_channels_without_statistics_are_refused_with_what_to_do(name: str, channels: int) -> None:
    message = (
        rf"takes images of {channels} channels, and its preprocessing is of 3.*mean=…, std=…\), {channels} numbers"
    )
    with pytest.raises(ValueError, match=message):
        build(name, channels).prepare(array(channels))


@pytest.mark.parametrize("geometry", ["transformers", "torchvision"])
@pytest.mark.parametrize("mode", ["crop", "squash", "pad", "border"])
def test_each_channel_is_prepared_as_if_it_were_one_of_a_picture(mode: Any, geometry: Any) -> None:
    values = array(5)
    mean, std = (0.1, 0.2, 0.3, 0.4, 0.5), (0.5, 0.4, 0.3, 0.2, 0.1)
    preprocessing = Preprocessing((28, 32), mean, std, mode=mode, geometry=geometry, crop_pct=0.9)
    found = preprocessing.batch(values)[0]
    assert preprocessing.channels == 5
    for channel in range(5):
        same = [channel] * 3
        alone = replace(preprocessing, mean=(mean[channel],) * 3, std=(std[channel],) * 3)
        picture = Image.fromarray(np.ascontiguousarray(values[..., same]))
        torch.testing.assert_close(found[channel], alone(picture)[0], rtol=0, atol=0)
    assert Preprocessing.from_dict(preprocessing.to_dict()) == preprocessing


def test_one_channel_is_a_picture_in_shades_of_grey() -> None:
    preprocessing = Preprocessing((16, 16), (0.5,), (0.5,), mode="squash")
    grey = Image.fromarray(array(1)[..., 0])
    expected = Preprocessing((16, 16), HALF, HALF, mode="squash").batch(grey)[:, :1]
    for given in (grey, array(1), array(1)[..., 0], [grey], grey.convert("RGB")):
        torch.testing.assert_close(preprocessing.batch(given), expected, rtol=0, atol=0)


FOUR = Preprocessing((16, 16), (0.5,) * 4, (0.5,) * 4)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (Image.new("RGB", (8, 8)), ValueError, r"red, green and blue, and 4 channels are wanted; give uint8 arrays"),
        (array(3), ValueError, r"an image has shape \(50, 70, 3\); give an array \(height, width, 4\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, r"give a tensor \(4, height, width\)"),
        (np.zeros((8, 0, 4), np.uint8), ValueError, r"an image has shape \(8, 0, 4\)"),
        (
            np.zeros((8, 8, 4), np.uint16),
            ValueError,
            "dtype uint16, of which nobody can tell what is white; give uint8",
        ),
        (np.zeros((8, 8), np.uint8), ValueError, r"an image has shape \(8, 8\); give an array \(height, width, 4\)"),
        ("cat.jpg", TypeError, "images are a str; give arrays or tensors of uint8 with 4 channels"),
        ([], ValueError, "Preprocessing.batch got no images"),
    ],
)
def test_what_has_other_channels_is_refused(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FOUR.batch(images)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mean": (), "std": ()}, r"Preprocessing mean=\(\) has 0 entries, std=\(\) has 0; give one of each"),
        ({"mean": (0.5,) * 4, "std": HALF}, r"mean=.* has 4 entries, std=.* has 3; give one of each"),
        (
            {"mean": (0.5,) * 4, "std": (0.5,) * 4, "fill": (0, 0, 0)},
            r"Preprocessing fill=.* has 3 entries; expected 4",
        ),
    ],
)
def test_statistics_are_one_for_each_channel(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preprocessing((16, 16), **fields)


def test_statistics_of_a_models_own_channels_are_read() -> None:
    model = randomise_parameters(timm.create_model("vit_tiny_patch16_224", in_chans=4, img_size=32, depth=2))
    cfg: Any = model.pretrained_cfg
    model.pretrained_cfg = {**cfg, "mean": (0.1, 0.2, 0.3, 0.4), "std": (0.5,) * 4, "input_size": (4, 32, 32)}
    backbone = layerfuse.create_backbone(model, layers=1)
    assert backbone.preprocessing.mean == (0.1, 0.2, 0.3, 0.4)
    assert backbone(backbone.prepare(array(4))).grids == ((2, 2),)


@pytest.mark.parametrize(
    "case", [case for case in CASES if str(case) in ("open_clip-clip", "open_clip-siglip")], ids=str
)
def test_open_clip_builds_towers_of_three_channels_and_others_are_tapped(case: Case) -> None:
    with pytest.raises(ValueError, match="open_clip option 'in_chans' is unknown"):
        OpenClipBackbone.from_name("ViT-B-32", layers=1, pretrained=False, options={"in_chans": 4})
    model: Any = case.model()
    holder, name = (model.trunk.patch_embed, "proj") if hasattr(model, "trunk") else (model, "conv1")
    old = getattr(holder, name)
    wider = torch.nn.Conv2d(4, old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None)
    setattr(holder, name, wider)
    backbone = layerfuse.create_backbone("open_clip", model, layers=1)
    assert backbone.in_channels == 4
    backbone.preprocessing = replace(FOUR, size=backbone.image_size)
    assert backbone(backbone.prepare(array(4))).grids == ((3, 3),)
