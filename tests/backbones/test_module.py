"""Backbones from a user's own module."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from layerfuse.backbones import MODULES, ModuleBackbone, backbone_from_config, create_backbone
from layerfuse.errors import TapError
from layerfuse.preprocessing import IMAGENET_MEAN, Preprocessing
from layerfuse.testing import TinyViT, random_images, randomise_parameters

FACTS: dict[str, Any] = {"embed_dim": 32, "num_prefix_tokens": 1, "patch_size": 8, "image_size": 32}


def test_an_instance_is_tapped_where_the_blocks_are_found_by_structure() -> None:
    model = randomise_parameters(TinyViT()).eval()
    images = random_images()
    stored: list[torch.Tensor] = []
    handle = model.blocks[1].register_forward_hook(lambda module, args, output: stored.append(output))
    with torch.no_grad():
        model(images)
        handle.remove()
        features = ModuleBackbone(model, layers=2, **FACTS).eval()(images)
    torch.testing.assert_close(torch.cat([features.prefix[0], features.maps[0]], dim=1), stored[0], rtol=0, atol=0)


def test_the_tail_is_cut_off_by_path() -> None:
    backbone = ModuleBackbone(TinyViT(), layers=-1, tail=("norm", "head"), **FACTS)
    backbone(random_images()).maps[0].square().sum().backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_non_square_images_work_where_the_module_takes_them() -> None:
    class Convolutional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 4, 4)
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.patches(images).flatten(2).transpose(1, 2)
            for block in self.blocks:
                tokens = block(tokens)
            return tokens

    backbone = ModuleBackbone(
        Convolutional(), layers=(2, 0), embed_dim=8, num_prefix_tokens=0, patch_size=4, image_size=16, any_size=True
    )
    features = backbone(random_images(size=(8, 20)))
    assert features.grids == ((2, 5), (2, 5))
    assert features.prefix == ()
    assert backbone.preprocessing.mean == IMAGENET_MEAN


def test_an_own_preprocessing_is_taken() -> None:
    preprocessing = Preprocessing(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3, mode="pad")
    assert ModuleBackbone(TinyViT(), layers=1, preprocessing=preprocessing, **FACTS).preprocessing is preprocessing


def test_a_wrong_number_of_prefix_tokens_is_told_from_the_shapes() -> None:
    backbone = ModuleBackbone(TinyViT(), layers=1, **{**FACTS, "num_prefix_tokens": 2})
    with pytest.raises(ValueError, match=r"layer 1 put out a tensor of shape \(2, 17, 32\); expected.*\(2, 18, 32\)"):
        backbone(random_images())


class TokenViT(nn.Module):
    """A Vision Transformer whose blocks may take (tokens, B, C), without a convolution."""

    def __init__(self, *, batch_first: bool, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(channels * 16, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=batch_first)
        self.blocks = nn.ModuleList(copy.deepcopy(layer) for _ in range(2))
        self.batch_first = batch_first

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(nn.functional.unfold(images, 4, stride=4).transpose(1, 2))
        tokens = tokens if self.batch_first else tokens.transpose(0, 1)
        for block in self.blocks:
            tokens = block(tokens)
        return tokens


TOKEN_FACTS: dict[str, Any] = {"embed_dim": 8, "num_prefix_tokens": 0, "patch_size": 4, "image_size": 8}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 5, 8])
def test_blocks_that_take_tokens_before_the_batch_are_refused_at_every_batch_size(batch_size: int) -> None:
    """With as many images as tokens (4) both orders have one shape."""
    backbone = ModuleBackbone(TokenViT(batch_first=False), layers=(0, 1, 2), **TOKEN_FACTS)
    with pytest.raises(TapError, match=r"layer 0 put out.*The blocks take \(tokens, B, C\): build.*batch_first=True"):
        backbone(random_images(batch_size, size=8))


@pytest.mark.parametrize("seen_before", [False, True])
def test_as_many_images_as_tokens_give_the_maps_of_each_image(seen_before: bool) -> None:
    backbone = ModuleBackbone(TokenViT(batch_first=True), layers=(0, 2), **TOKEN_FACTS).eval()
    images = random_images(4, size=8)
    with torch.no_grad():
        if seen_before:
            backbone(images[:3])
        together = backbone(images)
        for index in range(4):
            alone = backbone(images[index : index + 1])
            torch.testing.assert_close([m[index : index + 1] for m in together], list(alone))


def test_channels_of_a_module_without_a_convolution_are_told_by_the_user() -> None:
    model = TokenViT(batch_first=True, channels=4)
    with pytest.raises(ValueError, match=r"expected \(B, 3, height, width\)"):
        ModuleBackbone(model, layers=1, **TOKEN_FACTS)(torch.zeros(1, 4, 8, 8))
    backbone = ModuleBackbone(model, layers=1, in_channels=4, **TOKEN_FACTS)
    assert backbone(torch.zeros(1, 4, 8, 8)).grids == ((2, 2),)


def test_layer_0_is_tapped_alone_whatever_its_block_is_called_with() -> None:
    class Keyword(TokenViT):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = self.embed(nn.functional.unfold(images, 4, stride=4).transpose(1, 2))
            for block in self.blocks:
                tokens = block(src_mask=None, src=tokens)
            return tokens

    both = ModuleBackbone(Keyword(batch_first=True), layers=(0, 1), **TOKEN_FACTS).eval()
    alone = ModuleBackbone(Keyword(batch_first=True), layers=0, **TOKEN_FACTS).eval()
    images = random_images(size=8)
    torch.testing.assert_close(alone(images).maps[0], both(images).maps[0], rtol=0, atol=0)


class Odd(nn.Module):
    """A block whose output has another shape than its input."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.change(tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :-3], r"\(2, 14, 32\).*Tokens were dropped.*patch dropout, which eval mode"),
        (lambda x: x[:, 1:], r"\(2, 16, 32\).*the patches alone.*num_prefix_tokens=0"),
        (lambda x: x[:, :, :-1], r"\(2, 17, 31\).*Check embed_dim"),
        (lambda x: x[:, 1:].unflatten(1, (4, 4)), r"\(2, 4, 4, 32\).*do not work on \(B, tokens, C\)"),
        (lambda x: x[:1], r"\(1, 17, 32\).*do not see the batch"),
        (lambda x: torch.cat([x, x[:, :2]], dim=1), r"\(2, 19, 32\).*Check num_prefix_tokens and patch_size"),
    ],
)
def test_a_shape_that_does_not_fit_says_what_it_points_to(change, message: str) -> None:
    model = TinyViT(depth=1)
    model.blocks[0] = Odd(change)
    backbone = ModuleBackbone(model, layers=1, blocks="blocks", tail=("norm", "head"), **FACTS)
    with pytest.raises(TapError, match=f"layer 1 put out a tensor of shape {message}"):
        backbone(random_images())


def test_a_block_list_that_is_not_there_is_an_error_that_lists_the_ones_found() -> None:
    with pytest.raises(ValueError, match="TinyViT has no block list at 'encoder.layers'.*Found: blocks"):
        ModuleBackbone(TinyViT(), layers=1, blocks="encoder.layers", **FACTS)


def test_a_tail_that_is_not_there_is_an_error_that_lists_the_children() -> None:
    with pytest.raises(ValueError, match="TinyViT has no submodule 'pool' to cut off; its children: patches, blocks"):
        ModuleBackbone(TinyViT(), layers=1, tail=("pool",), **FACTS)


def test_an_instance_has_no_config() -> None:
    with pytest.raises(ValueError, match="made from a TinyViT that layerfuse cannot build again.*from_name"):
        _ = ModuleBackbone(TinyViT(), layers=1, **FACTS).config


def test_a_module_without_the_switch_has_no_gradient_checkpointing() -> None:
    with pytest.raises(ValueError, match="TinyViT has no set_grad_checkpointing method"):
        ModuleBackbone(TinyViT(), layers=1, **FACTS).set_gradient_checkpointing()


def test_a_registered_module_is_built_at_another_size() -> None:
    options = {**FACTS, "arguments": {"image_size": 48}}
    backbone = create_backbone("module:tiny-vit", layers=1, pretrained=False, image_size=48, options=options)
    assert backbone(random_images(size=48)).grids == ((6, 6),)


@pytest.mark.parametrize(
    ("name", "pretrained", "options", "message"),
    [
        ("tiny-vit", True, FACTS, "module 'tiny-vit' has no pretrained weights"),
        ("tiny-vitt", False, FACTS, "module 'tiny-vitt' is unknown; did you mean 'tiny-vit'"),
        ("tiny-vit", False, {**FACTS, "patchsize": 8}, "option 'patchsize' is unknown; did you mean 'patch_size'"),
        ("tiny-vit", False, {"embed_dim": 8}, "missing: num_prefix_tokens, patch_size, image_size"),
    ],
)
def test_what_cannot_be_built_says_why(name: str, pretrained: bool, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_backbone(f"module:{name}", layers=1, pretrained=pretrained, options=options)


def test_a_registered_module_brings_its_weights() -> None:
    given = {**FACTS, "blocks": "blocks", "tail": ["norm", "head"], "arguments": {"depth": 2}}

    @MODULES.register("vit-with-weights")
    class Pretrained(TinyViT):
        """Its weights are known to it alone."""

        def load_pretrained(self) -> None:
            randomise_parameters(self, seed=5)

    try:
        backbone = create_backbone("module:vit-with-weights", layers=2, options=given)
        whole = randomise_parameters(TinyViT(depth=2), seed=5)
        expected = create_backbone(whole, layers=2, options={**FACTS, "tail": ["norm", "head"]})
        torch.testing.assert_close(backbone(random_images()).maps, expected(random_images()).maps, rtol=0, atol=0)
        random = create_backbone("module:vit-with-weights", layers=2, pretrained=False, options=given)
        assert not torch.equal(random.model.positions, backbone.model.positions)
        # What is saved brings its own weights, so the module's are not loaded again.
        rebuilt = backbone_from_config(backbone.config)
        assert not torch.equal(rebuilt.model.positions, backbone.model.positions)
        # A partial of the class brings them, too.
        MODULES.register("partial-vit")(functools.partial(Pretrained, depth=2))  # type: ignore[arg-type]
        partial = create_backbone("module:partial-vit", layers=2, options={**given, "arguments": {}})
        torch.testing.assert_close(partial(random_images()).maps, expected(random_images()).maps, rtol=0, atol=0)
    finally:
        del MODULES._entries["vit-with-weights"]
        MODULES._entries.pop("partial-vit", None)


def test_a_partial_without_weights_says_so() -> None:
    MODULES.register("bare-partial")(functools.partial(TinyViT, depth=2))  # type: ignore[arg-type]
    try:
        assert create_backbone("module:bare-partial", layers=1, pretrained=False, options=FACTS).num_blocks == 2
        with pytest.raises(ValueError, match="'bare-partial' has no pretrained weights .* TinyViT has no method load_"):
            create_backbone("module:bare-partial", layers=1, options=FACTS)
    finally:
        del MODULES._entries["bare-partial"]
