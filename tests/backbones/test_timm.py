"""Names, sizes, preprocessing and local weights of the timm family."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from layerfuse.backbones import ModuleBackbone, TimmBackbone, backbone_from_config, create_backbone
from layerfuse.preprocessing import CLIP_MEAN, HALF, IMAGENET_MEAN, Preprocessing
from layerfuse.testing import random_images, randomise_parameters

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
CLIP = "vit_large_patch14_clip_quickgelu_336.openai"


def tiny(name: str = CLIP, **options: Any) -> TimmBackbone:
    backbone = TimmBackbone.from_name(name, layers=(0, 2), pretrained=False, options={**TINY, **options})
    randomise_parameters(backbone, std=0.1)
    return backbone.eval()


@pytest.mark.parametrize(
    ("name", "size", "mean", "mode", "interpolation"),
    [
        (CLIP, 336, CLIP_MEAN, "crop", "bicubic"),
        ("vit_base_patch16_siglip_224.webli", 224, HALF, "crop", "bicubic"),
        ("vit_base_patch16_siglip_224.v2_webli", 224, HALF, "crop", "bicubic"),
        ("eva02_base_patch16_clip_224.merged2b", 224, CLIP_MEAN, "crop", "bicubic"),
        ("vit_small_patch14_reg4_dinov2.lvd142m", 518, IMAGENET_MEAN, "crop", "bicubic"),
        ("vit_small_patch16_dinov3.lvd1689m", 256, IMAGENET_MEAN, "crop", "bicubic"),
    ],
)
def test_preprocessing_comes_from_the_tags_config(
    name: str, size: int, mean: tuple[float, ...], mode: str, interpolation: str
) -> None:
    with torch.device("meta"):
        preprocessing = TimmBackbone.from_name(name, layers=1, pretrained=False).preprocessing
    assert preprocessing.size == (size, size)
    assert preprocessing.mean == pytest.approx(mean)
    assert (preprocessing.mode, preprocessing.interpolation) == (mode, interpolation)


@pytest.mark.parametrize("name", [CLIP, "vit_base_patch16_siglip_224.webli", "vit_base_patch16_224.augreg_in21k"])
@pytest.mark.parametrize("shape", [(200, 320), (320, 200), (64, 64)])
def test_prepared_images_equal_timms_own_transform(name: str, shape: tuple[int, int]) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **TINY)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = create_transform(**resolve_model_data_config(model), is_training=False)(image)
    actual = TimmBackbone(model, layers=1).preprocessing(image)
    # These shapes have margins of which torchvision's halves (rounded to even) and ours (rounded down) are the same.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_crop_margins_are_timms_for_every_config_it_has() -> None:
    configs = {(cfg.input_size[-1], cfg.crop_pct) for cfg in map(timm.get_pretrained_cfg, timm.list_pretrained())}
    assert len(configs) > 50
    for edge, crop_pct in sorted(configs):
        if not 0 < crop_pct <= 1:
            continue
        preprocessing = Preprocessing(size=(edge, edge), mean=HALF, std=HALF, crop_pct=crop_pct)
        assert preprocessing.covering_size == (math.floor(edge / crop_pct),) * 2, (edge, crop_pct)


@pytest.mark.parametrize(
    "name", [CLIP, "eva02_base_patch16_clip_224", "vit_small_patch14_reg4_dinov2", "beit_base_patch16_224"]
)
def test_another_image_size_is_resampled_as_timm_does_it(name: str) -> None:
    model = randomise_parameters(timm.create_model(name, **TINY, img_size=112), std=0.1).eval()
    expected_model = copy.deepcopy(model)
    expected_model.set_input_size(img_size=(112, 224))
    images = random_images(1, size=(112, 224))
    backbone = TimmBackbone(model, layers=2, image_size=(112, 224)).eval()
    with torch.no_grad():
        expected = expected_model.forward_intermediates(images, indices=1, intermediates_only=True, output_fmt="NLC")
        features = backbone(images)
    torch.testing.assert_close(features.maps[0], expected[0], rtol=0, atol=0)
    patch = backbone.patch_size[0]
    assert features.grids == ((112 // patch, 224 // patch),)
    assert backbone.preprocessing.size == backbone.image_size == (112, 224)
    rebuilt = backbone_from_config(backbone.config).eval()
    rebuilt.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(images).maps, features.maps, rtol=0, atol=0)


@pytest.mark.parametrize("name", [CLIP, "eva02_base_patch16_clip_224", "vit_small_patch16_dinov3"])
def test_a_dynamic_model_takes_every_multiple_of_its_patch_size(name: str) -> None:
    backbone = tiny(name, dynamic_img_size=True, img_size=112)
    patch = backbone.patch_size[0]
    for rows, columns in ((1, 1), (3, 5), (7, 2)):
        assert backbone(random_images(1, size=(rows * patch, columns * patch))).grids == ((rows, columns),) * 2
    with pytest.raises(ValueError, match="takes multiples of its patch size"):
        backbone(random_images(1, size=(patch + 1, patch)))


def test_a_checkpoint_file_is_loaded(tmp_path: Path) -> None:
    model = randomise_parameters(timm.create_model(CLIP, **TINY, img_size=28, num_classes=0), std=0.1).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    options = {**TINY, "img_size": 28, "checkpoint_path": str(tmp_path / "weights.pth")}
    backbone = TimmBackbone.from_name(CLIP, layers=(1, 2), pretrained=False, options=options).eval()
    images = random_images(size=28)
    with torch.no_grad():
        expected = model.forward_intermediates(images, indices=2, intermediates_only=True, output_fmt="NLC")
        torch.testing.assert_close(list(backbone(images)), expected, rtol=0, atol=0)
    assert "checkpoint_path" not in backbone.config["recipe"]["options"]
    assert str(tmp_path) not in str(backbone.config)


def test_a_local_folder_is_loaded_and_rebuilt_without_it(tmp_path: Path) -> None:
    model = randomise_parameters(timm.create_model(CLIP, **TINY, img_size=28, num_classes=0), std=0.1).eval()
    folder = tmp_path / "saved"
    timm.models.save_for_hf(model, folder, model_args={**TINY, "img_size": 28})
    backbone = TimmBackbone.from_name(f"local-dir:{folder}", layers=(1, 2)).eval()
    images = random_images(size=28)
    with torch.no_grad():
        expected = model.forward_intermediates(images, indices=2, intermediates_only=True, output_fmt="NLC")
        torch.testing.assert_close(list(backbone(images)), expected, rtol=0, atol=0)
    config = backbone.config
    assert str(folder) not in str(config)
    backbone_from_config(config).load_state_dict(backbone.state_dict())


def test_a_config_chooses_no_files(tmp_path: Path) -> None:
    config = tiny(img_size=28).config
    config["recipe"]["options"]["checkpoint_path"] = str(tmp_path / "not_there.pth")
    backbone_from_config(config)


def test_a_file_of_weights_that_is_not_there_is_named(tmp_path: Path) -> None:
    options = {**TINY, "checkpoint_path": str(tmp_path / "no.pth")}
    with pytest.raises(FileNotFoundError, match=r"no\.pth is no file, so 'vit_tiny_patch16_224' has no weights"):
        create_backbone("timm:vit_tiny_patch16_224", layers=1, pretrained=False, options=options)


def test_the_weights_of_the_tag_are_asked_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    create_model = timm.create_model

    def record(name: str, *, pretrained: bool, **options: Any) -> torch.nn.Module:
        asked.update(name=name, pretrained=pretrained)
        return create_model(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", record)
    create_backbone(f"timm:{CLIP}", layers=-1, options=TINY)
    assert asked == {"name": CLIP, "pretrained": True}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_large_patch14_clip_quickgelu_337", {}, "did you mean 'vit_large_patch14_clip_quickgelu_336'"),
        ("zzz", {}, "timm model 'zzz' is unknown; did you mean another"),
        ("vit_large_patch14_clip_quickgelu_336.opnai", {}, "has no pretrained tag 'opnai'; known tags: .*openai"),
        (CLIP, {"depht": 2}, "cannot be built with the options {'depht': 2}"),
        ("resnet18", {}, "ResNet is no Vision Transformer with one list of blocks"),
        ("tnt_s_patch16_224", {}, "TNT is no Vision Transformer with one list of blocks"),
        ("xcit_nano_12_p8_224", {}, "Xcit is no Vision Transformer with one list of blocks"),
        ("twins_pcpvt_small", {}, "Twins is no Vision Transformer with one list of blocks"),
    ],
)
def test_what_cannot_be_built_says_why(name: str, options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        create_backbone(f"timm:{name}", layers=-1, pretrained=False, options=options)


def test_an_image_size_between_patches_is_refused() -> None:
    with pytest.raises(
        ValueError, match="image_size 100x30 is no multiple of the patch size 14x14; take for example 98x28"
    ):
        TimmBackbone.from_name(CLIP, layers=1, pretrained=False, image_size=(100, 30), options=TINY)


def test_a_model_without_set_input_size_cannot_be_resized() -> None:
    model: Any = timm.create_model("vit_base_patch16_224", **TINY, img_size=48)
    model.set_input_size = None
    with pytest.raises(ValueError, match="takes only 48x48 pixels and has no set_input_size"):
        TimmBackbone(model, layers=1, image_size=64)


def test_a_naflex_model_takes_any_grid_without_being_resized() -> None:
    options = {**TINY, "pos_embed_grid_size": (3, 3)}
    backbone = TimmBackbone.from_name(
        "naflexvit_so400m_patch16_siglip", layers=1, pretrained=False, image_size=(64, 32), options=options
    )
    assert backbone.image_size == (64, 32)
    assert backbone(random_images(1, size=(64, 32))).grids == ((4, 2),)
    assert backbone(random_images(1, size=(16, 80))).grids == ((1, 5),)


def test_a_class_instance_that_timm_did_not_create_has_no_config() -> None:
    model = timm.models.VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1)
    with pytest.raises(ValueError, match="made from a VisionTransformer that layerfuse cannot build again"):
        _ = TimmBackbone(model, layers=1).config


@pytest.mark.parametrize("name", ["cait_xxs24_224", "convit_tiny"])
def test_layers_before_the_class_token_joins_are_refused_here_and_tapped_as_a_module(name: str) -> None:
    sizes = {"embed_dim": 32, "num_heads": 2, "img_size": 32}
    images = random_images()
    backbone = create_backbone(f"timm:{name}", layers=(0, 2), pretrained=False, options=sizes)
    with pytest.raises(ValueError, match=r"the class token joins later.*ModuleBackbone\(model, num_prefix_tokens=0"):
        backbone(images)
    model = timm.create_model(name, pretrained=False, **sizes)
    facts = {"embed_dim": model.embed_dim, "num_prefix_tokens": 0, "patch_size": 16, "image_size": 32}
    module = ModuleBackbone(model, layers=(0, 2), blocks="blocks", **facts)
    assert module(images).grids == ((2, 2),) * 2


def test_the_patch_size_is_told_by_the_embedding_where_the_image_leaves_a_rest() -> None:
    """120 pixels are eight patches of 14 and a rest, not eight of 15."""
    backbone = tiny("vit_so400m_patch14_siglip_384", img_size=120)
    assert backbone.patch_size == (14, 14)
    assert backbone.grid(120, 120) == (8, 8)
