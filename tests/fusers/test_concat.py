"""concat in the forms that others store: ViP-LLaVA's norm, Mllama's channel order, Eagle's resampling."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerfuse.backbones import create_backbone
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import Concat, fuser_from_config
from layerfuse.testing import random_features, random_images, randomise_parameters

transformers = pytest.importorskip("transformers")


def _others(name: str) -> Any:
    """A class of transformers; the test is skipped by its name where the installed version lacks it."""
    return getattr(transformers, name, None) or pytest.skip(f"transformers {transformers.__version__} has no {name}")


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_parity_with_vip_llavas_projector(eps: float) -> None:
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    vision = _others("CLIPVisionConfig")(**size, num_hidden_layers=12, image_size=28, patch_size=7)
    text = _others("LlamaConfig")(**size, num_hidden_layers=1, vocab_size=40)
    config = _others("VipLlavaConfig")(vision_config=vision, text_config=text, projector_layernorm_eps=eps)
    theirs = _others("VipLlavaModel")(config).eval()
    randomise_parameters(theirs)
    projector = theirs.multi_modal_projector

    layers = (-2, -5, -8, -11, 6)
    backbone = create_backbone(copy.deepcopy(theirs.vision_tower), layers=layers)
    ours = Concat(16, 5, norm="layer", norm_eps=eps)
    ours.norm.load_state_dict(projector.projector_layernorm.state_dict())

    images = random_images(2, size=28)
    with torch.no_grad():
        fused = ours(backbone(images))
        expected = theirs.get_image_features(images)
        states = theirs.vision_tower(images, output_hidden_states=True).hidden_states
        normal = projector.projector_layernorm(torch.cat([states[layer][:, 1:] for layer in layers], dim=-1))
        projected = projector.linear_2(projector.act(projector.linear_1(fused)))
    expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(fused, normal, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(projected, torch.stack(list(expected)), atol=1e-5, rtol=1e-5)


def test_parity_with_mllamas_vision_output() -> None:
    """Llama 3.2 Vision: the local encoder's layers, interleaved, behind the global encoder's output."""
    config = _others("MllamaVisionModel").config_class(
        hidden_size=16,
        intermediate_size=24,
        attention_heads=2,
        num_hidden_layers=6,
        num_global_layers=1,
        image_size=28,
        patch_size=7,
        max_num_tiles=2,
        supported_aspect_ratios=[[1, 1], [1, 2]],
        intermediate_layers_indices=[0, 2, 5],
        vision_output_dim=64,
    )
    theirs = transformers.MllamaVisionModel(config).eval()
    randomise_parameters(theirs)
    # Which state an index names differs between versions of transformers; the order of channels does not.
    states: list[torch.Tensor] = []
    theirs.transformer.register_forward_hook(lambda _, given, output: states.extend(output.hidden_states))
    with torch.no_grad():
        pixels = torch.randn(1, 1, 2, 3, 28, 28)
        output = theirs(pixels, torch.tensor([[2]]), torch.ones(1, 1, 2, dtype=torch.long)).last_hidden_state
    assert output.shape == (1, 1, 2, 17, 64)
    # Each tile is an image of ours: 4x4 patches between the class token and what is padded to a multiple of 8.
    maps = tuple(states[layer].unflatten(1, (2, -1))[0][:, 1:17] for layer in config.intermediate_layers_indices)
    fused = Concat(16, 3, order="interleaved")(FeatureMaps(maps, layers=(0, 2, 5), grids=((4, 4),) * 3))
    torch.testing.assert_close(fused, output[0, 0, :, 1:, 16:], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parity_with_eagles_formula(dtype: torch.dtype) -> None:
    sizes: list[Grid] = [(8, 8), (3, 5), (1, 1), (10, 2)]
    features = random_features([4, 6, 4, 2], grids=sizes, dtype=dtype)
    fused = Concat([4, 6, 4, 2], 4, resize="bilinear", grid=(8, 8))(features)
    expected = []
    for tokens, size in zip(features, sizes, strict=True):
        image = tokens.transpose(1, 2).reshape(2, -1, *size)
        resized = F.interpolate(image.float(), size=(8, 8), mode="bilinear", align_corners=True).to(dtype)
        expected.append(resized.flatten(2, 3).transpose(1, 2))
    torch.testing.assert_close(fused, torch.cat(expected, dim=-1), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_resampling_to_the_same_grid_is_exact(mode: str) -> None:
    features = random_features(8, num_layers=3, grids=(3, 5))
    for grid in (None, (3, 5)):
        assert torch.equal(Concat(8, 3, resize=mode, grid=grid)(features), torch.cat(features.maps, dim=-1))
    assert Concat(8, 3, resize=mode).flops(features.grids) == 0


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_maps_of_one_cell_are_spread_over_the_grid(mode: str) -> None:
    features = random_features(8, grids=[(1, 1), (3, 2)])
    fused = Concat(8, 2, resize=mode)(features)
    torch.testing.assert_close(fused[..., :8], features[0].expand(-1, 6, -1))
    assert torch.equal(fused[..., 8:], features[1])
    assert Concat(8, 2, resize=mode, grid=(1, 1))(features).shape == (2, 1, 16)


def test_resized_maps_lie_on_the_last_grid_or_the_one_that_is_named() -> None:
    sizes: list[Grid] = [(4, 6), (2, 3)]
    features = random_features([8, 4], grids=sizes)
    last, named = Concat([8, 4], 2, resize="bilinear"), Concat([8, 4], 2, resize="bicubic", grid=(5, 1))
    assert last.out_grid(sizes) == (2, 3) and named.out_grid(sizes) == (5, 1)
    assert last(features).shape == (2, 6, 12) and named(features).shape == (2, 5, 12)
    # Four cells are read for each number of the map that is resized, or sixteen of both.
    assert last.flops(sizes) == 2 * 4 * 6 * 8 and named.flops(sizes) == 2 * 16 * 5 * 12
    assert fuser_from_config(named.config).config == {**named.config, "grid": [5, 1]}


def test_interleaved_channels_are_blocks_in_another_order() -> None:
    features = random_features(5, num_layers=3, grids=(2, 3))
    blocks, interleaved = Concat(5, 3)(features), Concat(5, 3, order="interleaved")(features)
    assert torch.equal(interleaved.unflatten(-1, (5, 3)).transpose(-1, -2).flatten(-2), blocks)
    assert torch.equal(interleaved[..., :3], torch.stack([tokens[..., 0] for tokens in features], dim=-1))


@pytest.mark.parametrize("order", ["blocks", "interleaved"])
def test_concat_and_a_block_linear_layer_are_a_sum_of_linear_layers(order: str) -> None:
    linears = nn.ModuleList(nn.Linear(8, 6, bias=False) for _ in range(4)).double()
    fuser = Concat(8, 4, order=order, out_channels=6).double()
    weights = [linear.weight for linear in linears]
    joined = torch.cat(weights, dim=1) if order == "blocks" else torch.stack(weights, dim=-1).flatten(1)
    with torch.no_grad():
        fuser.proj.weight.copy_(joined)
        fuser.proj.bias.zero_()
    features = random_features(8, num_layers=4, grids=(2, 3), dtype=torch.float64)
    expected = sum(linear(tokens) for linear, tokens in zip(linears, features, strict=True))
    torch.testing.assert_close(fuser(features), expected)


@pytest.mark.parametrize("num_layers", [1, 2, 24])
@pytest.mark.parametrize("options", [{}, {"order": "interleaved"}, {"resize": "bilinear", "grid": (3, 2)}], ids=str)
def test_any_number_of_layers_is_taken(options: dict[str, Any], num_layers: int) -> None:
    for grid in ((1, 1), (2, 5)):
        features = random_features(4, num_layers=num_layers, grids=grid)
        fuser = Concat(4, num_layers, **options)
        assert fuser(features).shape == (2, math.prod(options.get("grid", grid)), 4 * num_layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "mixed"}, "order 'mixed' of fuser 'concat' is unknown. Known: blocks, interleaved"),
        ({"resize": "area"}, "resize 'area' of fuser 'concat' is unknown. Known: bicubic, bilinear, nearest"),
        ({"grid": (3, 4)}, r"grid \[3, 4\] of fuser 'concat' needs a way to get there; give resize, too: bilinear"),
        ({"resize": "nearest", "grid": (3,)}, r"grid of fuser 'concat' is \[3\]; give \(H, W\) in patches"),
        ({"resize": "nearest", "grid": (3, 0)}, r"grid of fuser 'concat' is \[3, 0\]; give .* at least 1"),
    ],
    ids=str,
)
def test_concat_refuses_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Concat(8, 2, **options)


def test_maps_of_other_widths_are_not_interleaved() -> None:
    with pytest.raises(ValueError, match="got maps of widths 8, 4; it needs one width for all maps. .* order='blocks'"):
        Concat([8, 4], 2, order="interleaved")
