"""What every family promises, over the registry; and the errors of the base class."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from layerfuse.backbones import BACKBONES, MODULES, Backbone, backbone_from_config, create_backbone
from layerfuse.backbones.base import as_pair
from layerfuse.preprocessing import Preprocessing
from layerfuse.testing import random_images, tiny_backbone
from tests.tap_support import tensors_alive

FAMILIES = ("module", "open_clip", "timm", "transformers")
every_family = pytest.mark.parametrize("family", FAMILIES)


def test_every_family_file_is_registered(root: Path) -> None:
    files = {path.stem for path in (root / "layerfuse" / "backbones").glob("[!_]*.py")} - {"base"}
    assert files == set(BACKBONES.names()) == set(FAMILIES)


@every_family
def test_a_tiny_backbone_gives_feature_maps(family: str) -> None:
    features = tiny_backbone(family, layers=(-1, 0, 2), num_blocks=4)(random_images(3))
    assert features.layers == (4, 0, 2)
    assert features.grids == ((4, 4),) * 3
    assert [tuple(feature_map.shape) for feature_map in features] == [(3, 16, 32)] * 3
    assert [tuple(prefix.shape) for prefix in features.prefix] == [(3, 1, 32)] * 3


@given(data=st.data(), num_blocks=st.integers(1, 4))
def test_any_layers_come_back_in_the_order_asked(data: st.DataObject, num_blocks: int) -> None:
    layers = data.draw(st.lists(st.integers(0, num_blocks), min_size=1, unique=True))
    signed = [data.draw(st.sampled_from((layer, layer - num_blocks - 1))) for layer in layers]
    backbone = tiny_backbone("module", layers=signed, num_blocks=num_blocks, embed_dim=8)
    images = random_images(1)
    whole = tiny_backbone("module", layers=range(num_blocks + 1), num_blocks=num_blocks, embed_dim=8)
    # Same numbers in both: the deeper model's first parameters are not the same draws, so they are copied.
    whole.load_state_dict({**whole.state_dict(), **backbone.state_dict()})
    with torch.no_grad():
        features, everything = backbone(images), whole(images)
    assert features.layers == tuple(layers)
    for layer, feature_map in zip(layers, features, strict=True):
        torch.testing.assert_close(feature_map, everything.layer(layer), rtol=0, atol=0)


@every_family
def test_a_config_survives_json_and_rebuilds_the_backbone(family: str) -> None:
    backbone = tiny_backbone(family, layers=(2, -1))
    config = json.loads(json.dumps(backbone.config))
    rebuilt = backbone_from_config(config).eval()
    rebuilt.load_state_dict(backbone.state_dict(), strict=True)
    assert rebuilt.config == backbone.config
    assert rebuilt.preprocessing == backbone.preprocessing
    images = random_images()
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(images).maps, backbone(images).maps, rtol=0, atol=0)


@every_family
def test_a_replaced_preprocessing_is_kept_in_the_config(family: str) -> None:
    backbone = tiny_backbone(family)
    backbone.preprocessing = Preprocessing(size=(32, 32), mean=(0.1,) * 3, std=(0.2,) * 3, mode="pad")
    assert backbone_from_config(backbone.config).preprocessing == backbone.preprocessing


@every_family
def test_nothing_tapped_is_kept_after_a_call(family: str) -> None:
    backbone = tiny_backbone(family)
    tokens = (2, 17, 32)
    before = tensors_alive(tokens)  # other tests' tensors
    features = backbone(random_images())
    assert tensors_alive(tokens) > before
    del features
    assert tensors_alive(tokens) <= before


@every_family
def test_a_copy_taps_itself(family: str) -> None:
    backbone = tiny_backbone(family)
    copied = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
        assert not torch.equal(copied(random_images()).maps[0], backbone(random_images()).maps[0])


@every_family
def test_a_frozen_backbone_stays_in_evaluation_mode_and_has_no_gradients(family: str) -> None:
    backbone = tiny_backbone(family).freeze()
    torch.nn.Sequential(backbone).train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone(random_images()).maps[0].requires_grad


@every_family
def test_a_backbone_is_built_on_the_meta_device(family: str) -> None:
    with torch.device("meta"):
        backbone = backbone_from_config(tiny_backbone(family).config)
    assert {parameter.device.type for parameter in backbone.parameters()} == {"meta"}


@every_family
def test_double_precision_is_kept(family: str) -> None:
    assert tiny_backbone(family).double()(random_images()).maps[0].dtype == torch.float64


@every_family
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 32, 32), r"images have shape \(3, 32, 32\); expected \(B, 3, height, width\).*images\[None\]"),
        ((2, 3, 0, 32), r"images have shape \(2, 3, 0, 32\), which holds no pixel"),
        ((0, 3, 32, 32), r"images have shape \(0, 3, 32, 32\), which holds no pixel; leave an empty batch out"),
        ((2, 1, 32, 32), r"images have shape \(2, 1, 32, 32\); expected \(B, 3, height, width\)"),
        ((2, 32, 32, 3), r"images have shape \(2, 32, 32, 3\); expected \(B, 3, height, width\)"),
    ],
)
def test_images_of_another_shape_are_refused(family: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_backbone(family)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            {"pixel_values": torch.zeros(1, 3, 32, 32)},
            r"are a dict; .*\(it holds 'pixel_values'\) pass the pixel values",
        ),
        ([torch.zeros(3, 32, 32)] * 2, r"are a list; expected \(B, 3, height, width\).*torch.stack\(images\)"),
        (Image.new("RGB", (32, 32)), r"are a Image; .*prepare pictures with backbone.prepare\(pictures"),
        ([Image.new("RGB", (32, 32))], r"are a list; .*prepare pictures with backbone.prepare\(pictures"),
        (np.zeros((1, 3, 32, 32)), r"are a ndarray; .*prepare pictures with backbone.prepare\(pictures"),
    ],
)
def test_images_that_are_no_tensor_are_refused(images: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"images {message}"):
        tiny_backbone("module")(images)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_images_have_the_channels_of_the_patch_embedding(channels: int) -> None:
    sizes = {"depth": 2, "embed_dim": 32, "num_heads": 2, "in_chans": channels}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    for family, name, options in (
        ("timm", "vit_tiny_patch16_224", sizes),
        ("timm", "naflexvit_base_patch16_siglip", sizes),
        ("transformers", "clip_vision_model", {**vision, "num_channels": channels}),
        ("transformers", "siglip2_vision_model", {**vision, "num_channels": channels}),
    ):
        backbone = create_backbone(f"{family}:{name}", layers=(0, 2), pretrained=False, options=options).eval()
        assert backbone.in_channels == channels
        assert backbone_from_config(backbone.config).in_channels == channels
        with torch.no_grad():
            features = backbone(torch.randn(1, channels, *backbone.image_size))
        height, width = backbone.image_size
        assert features.grids[0] == backbone.grid(height, width)
        with pytest.raises(
            ValueError, match=rf"expected \(B, {channels}, height, width\): as many channels as the patch"
        ):
            backbone(torch.randn(1, 3, *backbone.image_size))


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_are_cast_to_the_dtype_of_the_weight_that_they_meet(family: str, dtype: torch.dtype) -> None:
    """As in open_clip's half precision, where the class token stays in float32."""
    backbone = tiny_backbone(family).to(dtype)
    for name, parameter in backbone.model.named_parameters():
        if "class" in name or "cls" in name:
            parameter.data = parameter.data.float()
    assert backbone.dtype == dtype


def test_the_dtype_is_known_of_a_model_that_was_wrapped_since() -> None:
    backbone = tiny_backbone("module").double()
    backbone.model = torch.nn.Sequential(backbone.model)
    assert backbone.dtype == torch.float64
    assert backbone(random_images()).maps[0].dtype == torch.float64


def test_images_of_whole_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="images have dtype torch.uint8; expected a floating dtype"):
        tiny_backbone("module")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("family", ("module", "open_clip", "timm"))
def test_a_fixed_size_backbone_names_its_size(family: str) -> None:
    backbone = tiny_backbone(family)
    with pytest.raises(
        ValueError, match=r"40x48 pixels do not fit.*8x8 pixels\) takes only 32x32.*image_size=\(40, 48\)"
    ):
        backbone(random_images(size=(40, 48)))


def test_a_resizable_backbone_names_the_nearest_size() -> None:
    backbone = tiny_backbone("transformers")
    with pytest.raises(ValueError, match=r"45x3 pixels do not fit.*multiples.*8x8.*natively 32x32.*nearest is 48x8"):
        backbone(random_images(size=(45, 3)))


@every_family
def test_a_native_size_that_is_no_multiple_of_the_patch_size_is_taken(family: str) -> None:
    """As SigLIP's 384 pixels in patches of 14."""
    backbone = tiny_backbone(family, image_size=34, layers=(0, -1))
    assert backbone.patch_size == (8, 8)
    assert backbone.preprocessing.size == (34, 34)
    assert backbone(random_images(size=34)).grids == ((4, 4),) * 2
    with pytest.raises(ValueError, match="do not fit"):
        backbone(random_images(size=35))


@every_family
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((1, 4), r"layer 4 is outside this backbone \(3 blocks"),
        ((-5,), "layer -5 is outside this backbone"),
        ((3, -1), "more than once"),
        ((), "no layer was asked for"),
    ],
)
def test_impossible_layers_are_refused(family: str, layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_backbone(family, layers=layers)


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="backbone family 'tim' is unknown; did you mean 'timm'"):
        create_backbone("tim:vit_base_patch16_224", layers=-1)


def test_an_unknown_tiny_family_names_the_known() -> None:
    with pytest.raises(ValueError, match="tiny backbone of family 'resnet' is unknown. Known: module, open_clip, timm"):
        tiny_backbone("resnet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("family"), "a backbone config needs the key 'family'"),
        (lambda config: config.pop("recipe"), "missing: recipe, unknown: none"),
        (lambda config: config.update(layer=1), "missing: none, unknown: layer"),
        (lambda config: config.update(family="timmm"), "did you mean 'timm'"),
    ],
)
def test_a_config_with_wrong_keys_is_refused(change: Any, message: str) -> None:
    config = tiny_backbone("module").config
    change(config)
    with pytest.raises(ValueError, match=message):
        backbone_from_config(config)


def test_a_config_of_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match="is of the backbone family 'module', not 'timm'; use .*backbone_from_config"):
        BACKBONES.get("timm").from_config(tiny_backbone("module").config)


def test_options_that_are_no_json_make_no_config() -> None:
    options = {"norm_layer": torch.nn.LayerNorm, "embed_dim": 8, "depth": 1, "num_heads": 1, "img_size": 16}
    backbone = create_backbone("timm:vit_base_patch16_224", layers=1, pretrained=False, options=options)
    with pytest.raises(ValueError, match="options of this 'timm' backbone cannot be written as JSON"):
        _ = backbone.config


def test_a_size_that_is_no_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size \(1, 2, 3\) is no size in pixels"):
        as_pair((1, 2, 3))


def test_the_printed_form_tells_the_facts() -> None:
    assert "family='timm', layers=(1, 2, 3), num_blocks=3, embed_dim=32" in repr(tiny_backbone("timm"))


def test_an_outside_family_is_registered_like_our_own() -> None:
    class Mine(Backbone):
        """Another package's family."""

        family = "mine"

    BACKBONES.register("mine")(Mine)
    try:
        assert BACKBONES.get("mine") is Mine
    finally:
        del BACKBONES._entries["mine"]


def test_modules_are_registered_by_name() -> None:
    assert "tiny-vit" in MODULES


@every_family
def test_a_layers_digest_is_that_of_all_its_map_is_made_of_and_of_nothing_else(family: str) -> None:
    shallow = tiny_backbone(family, layers=(2, 0), num_blocks=4)
    deep = tiny_backbone(family, layers=(0, 2, 3), num_blocks=4)
    deep.load_state_dict({**deep.state_dict(), **shallow.state_dict()})
    digests = deep.layer_digests()
    assert list(digests) == [0, 2, 3] and len(set(digests.values())) == 3
    assert shallow.layer_digests() == {2: digests[2], 0: digests[0]}, "how deep it is cut does not matter"

    deep.preprocessing = deep.preprocessing.changed(mode="pad")
    assert deep.layer_digests() == digests
    blocks = deep.model.get_submodule(deep._blocks)
    with torch.no_grad():
        next(blocks[1].parameters()).view(-1)[-1] += 1e-3
    changed = deep.layer_digests()
    assert [changed[layer] == digests[layer] for layer in (0, 2, 3)] == [True, False, False]
    rounded = deep.to(torch.bfloat16).layer_digests()
    assert not set(rounded.values()) & set(changed.values())
