"""Several backbones side by side: their pictures, maps and grids, saving, and the names of OpenVLA's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from layerfuse import (
    BackboneGroup,
    FusedEncoder,
    create_backbone,
    create_backbone_group,
    create_encoder,
    create_fuser,
)
from layerfuse.backbones import backbone_from_config, load_prismatic_weights
from layerfuse.preprocessing import StackedPreprocessing, preprocessing_from_dict
from layerfuse.testing import random_images, randomise_parameters, tiny_backbone

CLIP, SIGLIP, DINO = (
    "timm:vit_base_patch16_clip_quickgelu_224.openai",
    "timm:vit_base_patch16_siglip_224.webli",
    "timm:vit_small_patch14_reg4_dinov2.lvd142m",
)
VIT: dict[str, Any] = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
WIDE = {**VIT, "embed_dim": 48}


def group_of(*, resample: str | None = "bilinear", grid: tuple[int, int] | None = None) -> BackboneGroup:
    """CLIP of 32 pixels with a class token, tapped twice, and SigLIP of 48 pixels without one, wider."""
    group = create_backbone_group(
        [CLIP, SIGLIP],
        layers=[(1, -2), (3,)],
        resample=resample,
        grid=grid,
        pretrained=False,
        image_size=[32, 48],
        options=[VIT, WIDE],
    )
    return randomise_parameters(group, std=0.1)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    numbers = np.random.default_rng(0)
    return [Image.fromarray(numbers.integers(0, 256, (40, 56, 3), dtype=np.uint8)) for _ in range(3)]


def test_each_backbone_sees_its_own_picture_to_the_bit(pictures: list[Image.Image]) -> None:
    group = group_of(resample=None)
    images = group.prepare(pictures)
    assert images.shape == (3, group.in_channels, *group.image_size) == (3, 6, 48, 48)
    assert not images[:, :3, 32:].any() and not images[:, :3, :, 32:].any()
    features = group(images)
    assert features.layers == group.layers == (1, 2, 3)
    assert features.sources == (0, 0, 1)
    assert features.grids == group.grids() == group.grids(48) == ((4, 4), (4, 4), (6, 6))
    assert features.channels == group.map_channels == (32, 32, 48)
    assert [tokens.shape[1] for tokens in features.prefix] == [1, 1, 0]
    apart = [member.prepare(pictures) for member in group.members]
    for found in (features, group(tuple(apart))):
        alone = [tokens for member, own in zip(group.members, apart, strict=True) for tokens in member(own)]
        for tokens, own in zip(found, alone, strict=True):
            assert torch.equal(tokens, own)


def test_maps_come_to_one_grid_as_in_eagle(pictures: list[Image.Image]) -> None:
    own, joined = group_of(resample=None), group_of(grid=(5, 5))
    images = own.prepare(pictures)
    features = joined(images)
    assert features.grids == joined.grids() == ((5, 5),) * 3
    for index, tokens in enumerate(features):
        # Eagle: F.interpolate(map.float(), size=grid, mode="bilinear", align_corners=True), then channels joined.
        image = F.interpolate(own(images).nchw(index), size=(5, 5), mode="bilinear", align_corners=True)
        torch.testing.assert_close(tokens, image.flatten(2).transpose(1, 2), rtol=0, atol=0)
    turned = BackboneGroup(joined.members, grid=(5, 5), order=(2, 0, 1))
    assert turned.taps == ((1, 3), (0, 1), (0, 2))
    assert torch.equal(turned(images)[0], features[2])
    assert (turned.map_channels, turned.layers) == ((48, 32, 32), turned(images).layers)
    assert backbone_from_config(turned.config).config == turned.config
    first = group_of(resample="nearest")
    assert first.grids() == ((4, 4),) * 3
    # Maps that have the grid already stay as they are.
    for found, tokens in zip(first(images), own(images).maps[:2], strict=False):
        assert torch.equal(found, tokens)


def test_pictures_of_another_size_go_to_every_backbone() -> None:
    options = {**VIT, "dynamic_img_size": True}
    group = create_backbone_group(
        [CLIP, SIGLIP], layers=-2, pretrained=False, image_size=32, options=[options, options], resample=None
    )
    assert group.grids(48) == ((6, 6), (6, 6))
    assert group(random_images(2, size=48).repeat(1, 2, 1, 1)).grids == ((6, 6), (6, 6))
    with pytest.raises(ValueError, match="takes only 32x32"):
        group_of().grids(40)


@pytest.fixture(scope="module")
def twins() -> BackboneGroup:
    """The same backbone twice: equal weights, two models."""
    return BackboneGroup([tiny_backbone(layers=(1, 3)), tiny_backbone(layers=(1, 3))])


def test_equal_backbones_average_to_one_and_repeat_its_channels(twins: BackboneGroup) -> None:
    one, images = twins.members[0], random_images(3)
    both, order = images.repeat(1, 2, 1, 1), torch.tensor([2, 0, 1])
    for name in ("average", "concat"):
        fused = create_fuser(name, in_channels=32, num_layers=4)(twins(both))
        alone = create_fuser(name, in_channels=32, num_layers=2)(one(images))
        wanted = torch.cat([alone, alone], dim=-1) if name == "concat" else alone
        torch.testing.assert_close(fused, wanted)
    torch.testing.assert_close(twins(both[order])[3], twins(both)[3][order])


@pytest.mark.parametrize("fuser", ["concat", "mmfuser"])
def test_an_encoder_of_two_backbones_is_saved_and_loaded(
    fuser: str, pictures: list[Image.Image], tmp_path: Path
) -> None:
    # MMFuser takes maps of several grids, but of one width.
    wide = fuser == "concat"
    encoder = create_encoder(
        [CLIP, SIGLIP],
        layers=[(1, -2), (3,)],
        fuser=fuser,
        fuser_options={} if wide else {"num_heads": 4},
        pretrained=False,
        image_size=[32, 48],
        backbone_options=[VIT, WIDE if wide else VIT],
        resample="bilinear" if wide else None,
    )
    randomise_parameters(encoder, std=0.1)
    encoder.backbone.preprocessing = encoder.preprocessing.changed(mode="squash")
    images = encoder.prepare(pictures)
    tokens = encoder(images)
    assert tokens.shape == (3, encoder.num_tokens(), encoder.out_channels) == ((3, 16, 112) if wide else (3, 36, 32))
    encoder.save_pretrained(tmp_path)
    again = FusedEncoder.from_pretrained(tmp_path)
    assert again.config == encoder.config
    assert again.preprocessing == encoder.preprocessing
    assert torch.equal(again(images), tokens)
    assert torch.equal(again.prepare(pictures), images)


def test_a_text_gate_sees_patches_where_a_backbone_has_no_class_token() -> None:
    names: dict[str, Any] = {"layers": -2, "pretrained": False, "options": VIT, "image_size": 32}
    features = create_backbone_group([CLIP, SIGLIP], **names)(random_images(2).repeat(1, 2, 1, 1))
    options = {"condition_channels": 6, "groups": 2}
    fuser = create_fuser("text_gated", in_channels=32, num_layers=2, options=options)
    condition = torch.linspace(-1, 1, 12).view(2, 6)
    seen = replace(features, prefix=(features.prefix[0], features[1].mean(1, keepdim=True)))
    assert torch.equal(fuser(features, condition), fuser(seen, condition))


def test_a_group_is_exported_and_compiled_to_one_graph(pictures: list[Image.Image]) -> None:
    group = group_of()
    fuser = create_fuser("concat", in_channels=group.fuser_channels, num_layers=3)
    encoder = FusedEncoder(group, fuser).eval()
    images = encoder.prepare(pictures)
    exported = torch.export.export(encoder, (images,)).module()
    torch.testing.assert_close(exported(images), encoder(images))
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), encoder(images))


def test_a_group_freezes_trains_and_moves_as_one(twins: BackboneGroup) -> None:
    group = backbone_from_config(twins.config)
    assert isinstance(group, BackboneGroup)
    assert group.train().members[1].model.training
    group.set_gradient_checkpointing()
    tokens = group(random_images(1).repeat(1, 2, 1, 1))[3]
    tokens.sum().backward()
    assert all(weight.grad is not None for weight in group.members[1].model.blocks.parameters())
    group.members[1].to(torch.float64)
    assert group.dtype == torch.float64
    assert not group.freeze().train().members[0].model.training
    assert not any(weight.requires_grad for weight in group.parameters())


def test_what_does_not_fit_is_refused(twins: BackboneGroup, pictures: list[Image.Image]) -> None:
    names: dict[str, Any] = {"models": [CLIP, SIGLIP], "pretrained": False, "options": VIT, "image_size": 32}
    with pytest.raises(ValueError, match="layers has 1 entries for 2 backbones.*give one for each"):
        create_backbone_group(**names, layers=[(1, 2)])
    with pytest.raises(ValueError, match=r"image_size has 3 entries for 2 backbones.*an edge for all"):
        create_backbone_group(**names | {"image_size": [32, 32, 48]}, layers=1)
    with pytest.raises(TypeError, match="layers of several backbones are a str"):
        create_backbone_group(**names, layers="12")
    with pytest.raises(ValueError, match="resample 'bilinaer' is unknown; did you mean 'bilinear'"):
        create_backbone_group(**names, layers=1, resample="bilinaer")
    with pytest.raises(ValueError, match=r"grid=\(4, 4\) needs a way to get there; give resample"):
        create_backbone_group(**names, layers=1, resample=None, grid=(4, 4))
    with pytest.raises(ValueError, match=r"grid is \[4\]; give \(H, W\) in patches, two whole"):
        create_backbone_group(**names, layers=1, grid=(4,))
    with pytest.raises(ValueError, match=r"order is \(0, 0, 1, 2\); give each position from 0 to 3 once"):
        BackboneGroup(twins.members, order=(0, 0, 1, 2))
    with pytest.raises(ValueError, match="needs at least one"):
        BackboneGroup([])
    with pytest.raises(ValueError, match="given one model twice; copy it"):
        BackboneGroup([twins.members[0], twins.members[0]])
    with pytest.raises(ValueError, match=r"images have shape \(3, 3, 48, 48\); expected \(B, 6, height, width\)"):
        twins(random_images(3, size=48))
    with pytest.raises(ValueError, match="images are 1 tensors for 2 backbones"):
        twins([random_images(3)])
    with pytest.raises(ValueError, match="StackedPreprocessing of as many parts"):
        twins.preprocessing = twins.members[0].preprocessing
    with pytest.raises(ValueError, match="keys backbones, grid, order, resample; this one has backbones"):
        backbone_from_config({"backbones": []})
    wide = group_of(resample=None)
    with pytest.raises(ValueError, match="needs one grid.*4x4, 4x4, 6x6; tap layers of one grid, or bring them to one"):
        FusedEncoder(wide, create_fuser("concat", in_channels=wide.fuser_channels, num_layers=3))
    with pytest.raises(ValueError, match="needs one width for all maps. Tap layers of one width, or use 'concat'"):
        create_fuser("average", in_channels=wide.fuser_channels, num_layers=3)
    with pytest.raises(ValueError, match=r"grid=\(4, 4\) is for several backbones"):
        create_encoder(CLIP, layers=1, fuser="select", grid=(4, 4), pretrained=False)
    with pytest.raises(TypeError, match="several backbones are one list; write the family of each in front"):
        create_encoder([CLIP], "timm", layers=1)
    upright = [part.changed(upright=bool(place)) for place, part in enumerate(wide.preprocessing.parts)]
    with pytest.raises(ValueError, match="disagree whether pictures are turned upright"):
        StackedPreprocessing(tuple(upright))
    assert preprocessing_from_dict(wide.preprocessing.to_dict()) == wide.preprocessing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbones": None}, "has for 'backbones' None; give a list with the config of each"),
        ({"backbones": ["a", "b"]}, r"has for 'backbones' \['a', 'b'\]; give a list"),
        ({"backbones": [{"layers": [1]}]}, "has for 'backbones' .*with its 'family'"),
        ({"order": 5}, "order is 5; give each position from 0 to 2 once"),
        ({"order": ["a", 1, 2]}, r"order is \('a', 1, 2\); give each position"),
        ({"order": [[0], 1, 2]}, r"order is \(\[0\], 1, 2\); give each position"),
        ({"grid": 3}, r"grid is 3; give \(H, W\)"),
        ({"grid": ["a", 2]}, r"grid is \['a', 2\]; give \(H, W\)"),
        ({"grid": [float("nan"), 2]}, r"grid is \[nan, 2\]; give \(H, W\)"),
        ({"grid": [True, 2]}, r"grid is \[True, 2\]; give \(H, W\)"),
        ({"resample": ["bilinear"]}, r"resample \['bilinear'\] is unknown"),
    ],
)
def test_a_config_edited_by_hand_is_refused(change: dict[str, Any], message: str) -> None:
    config = group_of().config
    with pytest.raises(ValueError, match=message):
        backbone_from_config({**config, **change})
    nested = {**config, "backbones": [config, config["backbones"][0]]}
    with pytest.raises(ValueError, match="Groups do not hold groups"):
        backbone_from_config(nested)


@pytest.mark.parametrize("parts", [3, None, ["a"], [None]])
def test_preprocessings_that_are_no_list_of_configs_are_refused(parts: Any) -> None:
    with pytest.raises(ValueError, match="has for 'parts' .*; give a list with one config for each backbone"):
        preprocessing_from_dict({"parts": parts})


def test_what_is_no_list_of_backbones_is_refused(twins: BackboneGroup) -> None:
    one = twins.members[0]
    for given, kinds in (([twins, one], "BackboneGroup, TimmBackbone"), ([one.model], "VisionTransformer")):
        with pytest.raises(TypeError, match=f"was given: {kinds}; give a list of backbones.*do not hold groups"):
            BackboneGroup(given)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="was given: TimmBackbone; give a list"):
        BackboneGroup(one)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="models is a str; give a list with one model"):
        create_backbone_group(CLIP, layers=1, pretrained=False)
    assert BackboneGroup(twins.backbones).members == twins.members  # type: ignore[arg-type]  # a ModuleList


@pytest.mark.parametrize("copy", [False, [False, True]])
def test_one_model_for_two_backbones_is_refused_before_it_is_cut(copy: Any) -> None:
    import timm

    model = timm.create_model(CLIP.removeprefix("timm:"), img_size=32, **VIT)
    with pytest.raises(ValueError, match="one model, a VisionTransformer, for several backbones"):
        create_backbone_group([model, model], layers=[(1,), (3,)], copy=copy)
    assert len(model.blocks) == 3
    group = create_backbone_group([model, model], layers=[(1,), (3,)], copy=[True, False])
    assert [len(member.model.blocks) for member in group.members] == [1, 3]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["pretrained", "backbone_options", "copy"])
def test_lists_beside_one_model_are_refused(name: str) -> None:
    """[False] is true: weights would be downloaded, a model copied."""
    given: dict[str, Any] = {"pretrained": False, "backbone_options": VIT, "image_size": 32}
    with pytest.raises(TypeError, match=f"{name} is a list, for several backbones, and one model was given"):
        create_encoder(CLIP, layers=1, fuser="select", **given | {name: [given.get(name, False)]})
    with pytest.raises(ValueError, match="grid=4 is for several backbones"):
        create_encoder(CLIP, layers=1, fuser="select", grid=4, **given)  # type: ignore[arg-type]


def test_each_backbone_is_tapped_at_the_fusers_published_layers_for_its_depth() -> None:
    encoder = create_encoder(
        [CLIP, CLIP],
        fuser="mmfuser",
        fuser_options={"num_heads": 4},
        pretrained=False,
        image_size=32,
        backbone_options={**VIT, "depth": 24},
    )
    assert encoder.backbone.layers == (3, 8, 13, 18, 23) * 2
    with pytest.raises(TypeError, match="got a list. Several backbones are made by create_backbone_group"):
        create_backbone([CLIP, CLIP], layers=1)


@pytest.fixture(scope="module")
def openvla() -> dict[str, torch.Tensor]:
    """Weights of two whole timm models under OpenVLA's names, as its published checkpoint has them."""
    import timm

    stored = {"language_model.lm_head.weight": torch.zeros(2, 2)}
    for place, (name, options) in {"featurizer": (DINO, VIT), "fused_featurizer": (SIGLIP, WIDE)}.items():
        model = timm.create_model(name.removeprefix("timm:"), num_classes=0, img_size=32, **options)
        for key, tensor in randomise_parameters(model, std=0.1).state_dict().items():
            stored[f"vision_backbone.{place}.{key.replace('.gamma', '.scale_factor')}"] = tensor
    return stored


def _openvla_group(**changes: Any) -> BackboneGroup:
    arguments = {"layers": -2, "pretrained": False, "image_size": 32, "options": [VIT, WIDE]} | changes
    return create_backbone_group([DINO, SIGLIP], **arguments)


def test_weights_of_openvla_load_and_give_its_patches(openvla: dict[str, torch.Tensor], tmp_path: Path) -> None:
    group = _openvla_group()
    save_file(openvla, tmp_path / "model-00001-of-00001.safetensors")
    load_prismatic_weights(group, tmp_path)
    images = random_images(2, size=32).repeat(1, 2, 1, 1)
    wanted = []
    for place, options, name in (("featurizer", VIT, DINO), ("fused_featurizer", WIDE, SIGLIP)):
        whole = create_backbone(name, layers=3, pretrained=False, image_size=32, options=options).model
        prefix = f"vision_backbone.{place}."
        for key, tensor in whole.state_dict().items():
            tensor.copy_(openvla[prefix + key.replace(".gamma", ".scale_factor")])
        # The published code: get_intermediate_layers(n={len(blocks) - 2}), without the final norm.
        wanted.append(whole.get_intermediate_layers(images[:, :3], n={len(whole.blocks) - 2})[0])
    torch.testing.assert_close(torch.cat(group(images).maps, dim=-1), torch.cat(wanted, dim=-1))
    # Prismatic's own files name the models by what they are.
    names = {"vision_backbone.featurizer": "dino_featurizer", "vision_backbone.fused_featurizer": "siglip_featurizer"}
    renamed = dict(openvla)
    for old, new in names.items():
        renamed = {key.replace(f"{old}.", f"{new}."): tensor for key, tensor in renamed.items()}
    again = _openvla_group()
    load_prismatic_weights(again, renamed)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), group.parameters(), strict=True))


def test_weights_of_openvla_that_do_not_fit_are_refused(openvla: dict[str, torch.Tensor], tmp_path: Path) -> None:
    group = _openvla_group()
    before = [weight.clone() for weight in group.parameters()]
    stray = "vision_backbone.fused_featurizer.blocks.7.norm1.weight"
    for weights, message in (
        (openvla | {stray: torch.zeros(48)}, "vision model 1 do not fit.*Unexpected: blocks.7.norm1.weight"),
        ({k: v for k, v in openvla.items() if "fused_featurizer.blocks.0.norm1" not in k}, "Missing: blocks.0.norm1"),
        ({k: v for k, v in openvla.items() if ".fused_" not in k}, "these vision models: featurizer; the group has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            load_prismatic_weights(group, weights)
    with pytest.raises(ValueError, match="Of another shape: blocks.0"):
        load_prismatic_weights(_openvla_group(options=[VIT, VIT]), openvla)
    assert all(torch.equal(a, b) for a, b in zip(group.parameters(), before, strict=True))
    with pytest.raises(FileNotFoundError, match="no safetensors file and no folder with one"):
        load_prismatic_weights(group, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        load_prismatic_weights(group, tmp_path / "model.safetensors")


def test_what_are_no_weights_of_openvla_is_refused(openvla: dict[str, torch.Tensor]) -> None:
    group, name = _openvla_group(), "vision_backbone.featurizer.cls_token"
    kept = {key: tensor.clone() for key, tensor in group.state_dict().items()}
    # Which of two names counts would be chance.
    twice = openvla | {"vision_backbone.dino_featurizer.cls_token": openvla[name] + 1}
    with pytest.raises(ValueError, match=f"has {name} and .*dino_featurizer.cls_token, which are weights of one model"):
        load_prismatic_weights(group, twice)
    with pytest.raises(TypeError, match="cls_token of the checkpoint is a str; give tensors"):
        load_prismatic_weights(group, openvla | {name: "x"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="cls_token of the checkpoint is on the meta device, without values; load"):
        load_prismatic_weights(group, openvla | {name: openvla[name].to("meta")})
    with pytest.raises(TypeError, match="weights are a NoneType; give names with tensors"):
        load_prismatic_weights(group, None)  # type: ignore[arg-type]
    assert all(torch.equal(tensor, kept[key]) for key, tensor in group.state_dict().items())
    load_prismatic_weights(group, {**openvla, 3: torch.zeros(1)})  # type: ignore[dict-item]  # others are passed over
