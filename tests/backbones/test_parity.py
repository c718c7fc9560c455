"""Every backbone gives, bit for bit, what the model's own library gives; and it is as short as it can be."""

from __future__ import annotations

import copy

import pytest
import torch

from layerfuse.backbones import Backbone, backbone_from_config
from layerfuse.features import FeatureMaps
from layerfuse.testing import random_images
from tests.backbones.zoo import CASES, NUM_BLOCKS, WIDTH, Case

ALL_LAYERS = tuple(range(NUM_BLOCKS + 1))
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def images_for(case: Case) -> torch.Tensor:
    return random_images(2, size=case.image_size)


def tokens_of(features: FeatureMaps) -> list[torch.Tensor]:
    """Prefix and patch tokens together again, as blocks put them out."""
    if not features.prefix:
        return list(features.maps)
    return [torch.cat(pair, dim=1) for pair in zip(features.prefix, features.maps, strict=True)]


def assert_identical(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for layer, (one, other) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=lambda text, i=layer: f"map {i}: {text}")


@every_case
def test_all_layers_equal_the_librarys_own_hidden_states(case: Case) -> None:
    model = case.model()
    images = images_for(case)
    with torch.no_grad():
        expected = case.hidden_states(model, images)
        features = case.backbone(copy.deepcopy(model), ALL_LAYERS)(images)
    assert len(expected) == NUM_BLOCKS + 1
    assert_identical(tokens_of(features), expected)


@every_case
def test_facts_are_read_from_the_model(case: Case) -> None:
    backbone = case.backbone(case.model(), -1)
    grid = case.image_size // case.patch_size
    assert backbone.num_blocks == NUM_BLOCKS
    assert backbone.embed_dim == WIDTH
    assert backbone.num_prefix_tokens == case.num_prefix_tokens
    assert backbone.patch_size == (case.patch_size, case.patch_size)
    assert backbone.image_size == backbone.preprocessing.size == (case.image_size, case.image_size)
    assert backbone.grid(*backbone.image_size) == (grid, grid)


@every_case
def test_maps_come_in_the_order_asked(case: Case) -> None:
    model = case.model()
    images = images_for(case)
    with torch.no_grad():
        whole = case.backbone(copy.deepcopy(model), ALL_LAYERS)(images)
        odd = case.backbone(copy.deepcopy(model), (2, 0, -3))(images)
    assert odd.layers == (2, 0, 1)
    assert_identical(list(odd.maps), [whole.maps[2], whole.maps[0], whole.maps[1]])


@every_case
def test_every_parameter_left_gets_a_gradient_from_the_deepest_map(case: Case) -> None:
    backbone = case.backbone(case.model(), (1, 2))
    features = backbone(images_for(case))
    assert len(list(backbone.model.get_submodule(_block_path(backbone)).children())) == 2
    features.layer(2).square().sum().backward()
    without = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
    assert without == []


def _block_path(backbone: Backbone) -> str:
    paths = (
        "blocks",
        "trunk.blocks",
        "transformer.resblocks",
        "encoder.layers",
        "encoder.layer",
        "model.layer",
        "layers",
    )
    names = {name for name, _ in backbone.model.named_modules()}
    return next(path for path in paths if path in names)


@every_case
def test_layer_zero_alone_runs_no_block(case: Case) -> None:
    model = case.model()
    images = images_for(case)
    with torch.no_grad():
        expected = case.hidden_states(model, images)[:1]
    backbone = case.backbone(model, 0)
    features = backbone(images)
    assert_identical([tokens.detach() for tokens in tokens_of(features)], expected)
    assert next(backbone.model.get_submodule(_block_path(backbone)).parameters(), None) is None


@every_case
def test_fullgraph_compilation_changes_no_more_than_rounding(case: Case) -> None:
    backbone = case.backbone(case.model(), (3, 0))
    images = images_for(case)
    torch.compiler.reset()
    compiled = torch.compile(backbone, fullgraph=True, backend="eager")
    with torch.no_grad():
        # nn.MultiheadAttention (open_clip) has a fast path that compiled code does not take.
        torch.testing.assert_close(tokens_of(compiled(images)), tokens_of(backbone(images)), rtol=1e-5, atol=1e-5)


@every_case
def test_gradient_checkpointing_changes_no_map_and_no_gradient(case: Case) -> None:
    images = images_for(case)
    results = []
    for checkpointing in (False, True):
        backbone = case.backbone(case.model(), (1, 3)).train()
        if checkpointing:
            backbone.set_gradient_checkpointing()
        torch.manual_seed(1)
        features = backbone(images)
        sum(feature_map.square().mean() for feature_map in features).backward()
        gradients = {name: parameter.grad for name, parameter in backbone.named_parameters()}
        results.append((features, gradients))
    (plain, expected), (checkpointed, actual) = results
    assert_identical(tokens_of(checkpointed), tokens_of(plain))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@every_case
def test_bfloat16_weights_give_bfloat16_maps_from_float32_images(case: Case) -> None:
    backbone = case.backbone(case.model(), (0, 3)).to(torch.bfloat16)
    with torch.no_grad():
        features = backbone(images_for(case))
    assert {feature_map.dtype for feature_map in features} == {torch.bfloat16}
    assert all(feature_map.isfinite().all() for feature_map in features)


def test_the_promised_models_are_all_here() -> None:
    names = {str(case) for case in CASES}
    assert len(names) == len(CASES) == 29
    promised = {
        *(f"timm-{name}" for name in ("clip", "siglip", "eva02_clip", "dinov2_reg", "dinov3")),
        *(f"open_clip-{name}" for name in ("clip", "eva02_clip", "siglip")),
        *(f"transformers-{name}" for name in ("clip", "siglip", "siglip2_naflex", "dinov2", "dinov3")),
    }
    assert promised <= names


@every_case
def test_a_config_rebuilds_the_same_architecture(case: Case) -> None:
    model = case.model()
    backbone = case.backbone(model, (1, -2))
    if case.family == "open_clip":
        with pytest.raises(ValueError, match="has no config; make it with OpenClipBackbone.from_name"):
            _ = backbone.config
        return
    rebuilt = backbone_from_config(backbone.config).eval()
    rebuilt.load_state_dict(backbone.state_dict(), strict=True)
    images = images_for(case)
    with torch.no_grad():
        assert_identical(tokens_of(rebuilt(images)), tokens_of(backbone(images)))
    assert rebuilt.config == backbone.config
