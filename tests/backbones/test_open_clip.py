"""Names, tags, local weights, sizes and preprocessing of the open_clip family; the same weights in other libraries."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn

from layerfuse.backbones import OpenClipBackbone, TimmBackbone, TransformersBackbone, create_backbone
from layerfuse.preprocessing import CLIP_MEAN, HALF, Preprocessing
from layerfuse.testing import random_images, randomise_parameters

VISION = {"image_size": 28, "layers": 3, "width": 32, "head_width": 16, "patch_size": 14, "mlp_ratio": 2.0}
CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": VISION,
    "text_cfg": {"context_length": 4, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1},
}


@pytest.fixture
def tiny_clip(tmp_path: Path) -> Iterator[str]:
    """A model name that open_clip knows for the time of a test."""
    from open_clip import factory

    paths = list(factory._MODEL_CONFIG_PATHS)
    (tmp_path / "tiny-clip.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    yield "tiny-clip"
    factory._MODEL_CONFIG_PATHS[:] = paths
    factory._rescan_model_configs()


def reference(visual: Any, images: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        found = visual.forward_intermediates(images, indices=3, output_fmt="NLC", intermediates_only=True)
    return list(found["image_intermediates"])


def test_a_file_of_weights_is_loaded_by_its_path(tiny_clip: str, tmp_path: Path) -> None:
    clip = randomise_parameters(open_clip.create_model(tiny_clip), std=0.1).eval()
    torch.save(clip.state_dict(), tmp_path / "weights.pt")
    images = random_images(size=28)
    backbone = create_backbone(f"open_clip:{tiny_clip}:{tmp_path / 'weights.pt'}", layers=(1, 2, 3)).eval()
    with torch.no_grad():
        torch.testing.assert_close(list(backbone(images)), reference(clip.visual, images), rtol=0, atol=0)
    assert str(tmp_path) not in json.dumps(backbone.config)


def test_a_local_folder_is_loaded_with_its_preprocessing(tiny_clip: str, tmp_path: Path) -> None:
    clip = randomise_parameters(open_clip.create_model(tiny_clip), std=0.1).eval()
    torch.save(clip.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    described = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "resize_mode": "squash"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": described}))
    images = random_images(size=28)
    backbone = create_backbone(f"open_clip:local-dir:{tmp_path}", layers=(1, 2, 3)).eval()
    with torch.no_grad():
        torch.testing.assert_close(list(backbone(images)), reference(clip.visual, images), rtol=0, atol=0)
    assert backbone.preprocessing == Preprocessing(
        size=(28, 28), mean=HALF, std=(0.25,) * 3, mode="squash", geometry="torchvision", fill=(0, 0, 0)
    )
    assert str(tmp_path) not in json.dumps(backbone.config)


def test_position_embeddings_are_resampled_for_another_size(tiny_clip: str, tmp_path: Path) -> None:
    clip = randomise_parameters(open_clip.create_model(tiny_clip), std=0.1).eval()
    file = tmp_path / "weights.pt"
    torch.save(clip.state_dict(), file)
    images = random_images(size=(56, 42))
    expected = open_clip.create_model(tiny_clip, pretrained=str(file), force_image_size=(56, 42)).eval()
    backbone = create_backbone(f"open_clip:{tiny_clip}:{file}", layers=(1, 2, 3), image_size=(56, 42)).eval()
    with torch.no_grad():
        features = backbone(images)
    torch.testing.assert_close(list(features), reference(expected.visual, images), rtol=0, atol=0)
    assert features.grids == ((4, 3),) * 3
    assert backbone.preprocessing.size == (56, 42)


@pytest.mark.parametrize(
    ("name", "size", "mean", "mode"),
    [
        ("ViT-L-14-336-quickgelu:openai", 336, CLIP_MEAN, "crop"),
        ("ViT-B-16-SigLIP:webli", 224, HALF, "squash"),
        ("ViT-B-16-SigLIP", 224, HALF, "squash"),
        ("EVA02-L-14-336:merged2b_s6b_b61k", 336, CLIP_MEAN, "crop"),
    ],
)
def test_preprocessing_comes_from_the_tag(name: str, size: int, mean: tuple[float, ...], mode: str) -> None:
    with torch.device("meta"):
        preprocessing = create_backbone(f"open_clip:{name}", layers=1, pretrained=False).preprocessing
    assert (preprocessing.size, preprocessing.mean, preprocessing.mode) == ((size, size), mean, mode)


@pytest.mark.parametrize("name", ["ViT-L-14-336-quickgelu:openai", "ViT-B-16-SigLIP:webli"])
@pytest.mark.parametrize("shape", [(200, 320), (320, 200), (64, 64)])
def test_prepared_images_equal_open_clips_own_transform(name: str, shape: tuple[int, int]) -> None:
    base, _, tag = name.partition(":")
    with torch.device("meta"):
        preprocessing = create_backbone(f"open_clip:{name}", layers=1, pretrained=False).preprocessing
    config = {
        key: value
        for key, value in open_clip.get_pretrained_cfg(base, tag).items()
        if key in PreprocessCfg.__annotations__
    }
    transform = image_transform_v2(PreprocessCfg(**{**config, "size": preprocessing.size}), is_train=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    torch.testing.assert_close(preprocessing(image), transform(image), rtol=0, atol=1e-6)


def test_a_timm_model_inside_open_clip_is_resized_and_rebuilt() -> None:
    options = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "none", "embed_dim": 8}
    backbone = create_backbone(
        "open_clip:ViT-B-16-SigLIP", layers=(1, 2), pretrained=False, image_size=64, options=options
    )
    rebuilt = type(backbone).from_config(backbone.config).eval()
    rebuilt.load_state_dict(backbone.state_dict())
    images = random_images(size=64)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(images).maps, backbone.eval()(images).maps, rtol=0, atol=0)
    assert backbone.image_size == (64, 64)


def native(**vision: Any) -> nn.Module:
    clip: Any = open_clip.CLIP(16, open_clip.CLIPVisionCfg(**{**VISION, **vision}), CONFIG["text_cfg"], quick_gelu=True)
    return randomise_parameters(clip.visual, std=0.1).eval()


def test_the_same_weights_give_the_same_maps_in_timm() -> None:
    visual = native()
    options = {"embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0, "img_size": 28, "num_classes": 16}
    model = timm.create_model("vit_large_patch14_clip_quickgelu_336", **options)
    from timm.models.vision_transformer import checkpoint_filter_fn

    state = {f"visual.{name}": value for name, value in visual.state_dict().items()}
    model.load_state_dict(checkpoint_filter_fn(state, model), strict=True)
    images = random_images(size=28)
    with torch.no_grad():
        theirs = TimmBackbone(model.eval(), layers=(0, 1, 2, 3))(images)
        ours = OpenClipBackbone(visual, layers=(0, 1, 2, 3))(images)
    torch.testing.assert_close(theirs.maps, ours.maps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.prefix, ours.prefix, rtol=1e-5, atol=1e-5)


def to_hugging_face(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename OpenAI's layout to that of CLIPVisionModel."""
    names = {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        **{f"ln_pre.{end}": f"pre_layrnorm.{end}" for end in ("weight", "bias")},
        **{f"ln_post.{end}": f"post_layernorm.{end}" for end in ("weight", "bias")},
    }
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    inner["attn.out_proj"] = "self_attn.out_proj"
    renamed = {names[name]: value for name, value in state.items() if name in names}
    for name, value in state.items():
        if not name.startswith("transformer.resblocks."):
            continue
        number, _, rest = name.removeprefix("transformer.resblocks.").partition(".")
        block = f"encoder.layers.{number}"
        if rest.startswith("attn.in_proj_"):
            for key, part in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{block}.self_attn.{key}_proj.{rest.removeprefix('attn.in_proj_')}"] = part
        else:
            stem, _, end = rest.rpartition(".")
            renamed[f"{block}.{inner[stem]}.{end}"] = value
    return renamed


def test_the_same_weights_give_the_same_maps_in_transformers() -> None:
    visual = native()
    config = transformers.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=14
    )
    model = transformers.CLIPVisionModel(config)
    model.load_state_dict(to_hugging_face(visual.state_dict()), strict=True)
    images = random_images(size=28)
    with torch.no_grad():
        theirs = TransformersBackbone(model.eval(), layers=(0, 1, 2, 3))(images)
        ours = OpenClipBackbone(visual, layers=(0, 1, 2, 3))(images)
    torch.testing.assert_close(theirs.maps, ours.maps, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "pretrained", "options", "message"),
    [
        ("ViT-L-14-335", False, {}, "open_clip model 'ViT-L-14-335' is unknown; did you mean 'ViT-L-14"),
        (
            "ViT-L-14-336-quickgelu",
            True,
            {},
            "needs a tag .* as in 'ViT-L-14-336-quickgelu/openai'; known tags: openai",
        ),
        ("tiny-clip:no/such/file", True, {}, "open_clip cannot load 'no/such/file' into 'tiny-clip'.*Known tags: none"),
        ("ViT-B-16", False, {"widht": 8}, "open_clip option 'widht' is unknown; did you mean 'width'"),
        ("RN50", False, {}, "ModifiedResNet is no Vision Transformer of open_clip"),
    ],
)
@pytest.mark.usefixtures("tiny_clip")
def test_what_cannot_be_built_says_why(name: str, pretrained: bool, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_backbone(f"open_clip:{name}", layers=1, pretrained=pretrained, options=options)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no open_clip_config.json"):
        create_backbone(f"open_clip:local-dir:{tmp_path}", layers=1)


def test_a_built_native_tower_cannot_be_resized() -> None:
    with pytest.raises(
        ValueError, match=r"takes only 28x28 pixels and cannot be resized to 42x42.*image_size=\(42, 42\)"
    ):
        OpenClipBackbone(native(), layers=1, image_size=42)


def test_an_instances_own_preprocessing_is_taken(tiny_clip: str) -> None:
    clip: Any = open_clip.create_model(tiny_clip, force_preprocess_cfg={"mean": HALF, "resize_mode": "squash"})
    assert OpenClipBackbone(clip.visual, layers=1).preprocessing.mode == "squash"


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install layerfuse\[open-clip\]"):
        create_backbone("open_clip:ViT-B-16:openai", layers=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_takes_images_as_its_patch_embedding_does(dtype: torch.dtype) -> None:
    """open_clip's precision "fp16" and "bf16" leave the class token, which comes first, in float32."""
    from open_clip.model import CLIP, convert_weights_to_lp

    vision = {"width": 32, "layers": 2, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 1, "vocab_size": 1, "width": 8, "heads": 1, "layers": 1}
    clip = CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)
    convert_weights_to_lp(clip, dtype=dtype)
    assert next(clip.visual.parameters()).dtype == torch.float32
    backbone = OpenClipBackbone(clip.visual, layers=(0, 1, 2)).eval()
    assert backbone.dtype == dtype
    assert {feature_map.dtype for feature_map in backbone(random_images())} == {dtype}
