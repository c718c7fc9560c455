"""Names, checkpoints, sizes and preprocessing of the transformers family."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from layerfuse.backbones import TransformersBackbone, create_backbone
from layerfuse.backbones._transformers_facts import read_preprocessing
from layerfuse.preprocessing import CLIP_MEAN, HALF, IMAGENET_MEAN
from layerfuse.testing import random_images, randomise_parameters
from tests.backbones.zoo import CASES

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 8}


def two_towers(kind: str) -> Any:
    """A tiny CLIPModel or SiglipModel."""
    config_class, model_class = {
        "clip": (transformers.CLIPConfig, transformers.CLIPModel),
        "siglip": (transformers.SiglipConfig, transformers.SiglipModel),
    }[kind]
    text = {**TEXT, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return randomise_parameters(model_class(config_class(vision_config=SIZES, text_config=text)), std=0.1).eval()


def expected_maps(vision: Any, images: torch.Tensor, num_prefix_tokens: int, **call: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        hidden = vision(images, output_hidden_states=True, **call).hidden_states
    return [states[:, num_prefix_tokens:] for states in hidden]


@pytest.mark.parametrize(("kind", "num_prefix_tokens"), [("clip", 1), ("siglip", 0)])
def test_the_vision_part_of_a_checkpoint_with_text_is_loaded(tmp_path: Path, kind: str, num_prefix_tokens: int) -> None:
    model = two_towers(kind)
    model.save_pretrained(tmp_path)
    images = random_images()
    backbone = create_backbone(f"transformers:{tmp_path}", layers=(0, 1, 2, 3)).eval()
    with torch.no_grad():
        maps = list(backbone(images))
    torch.testing.assert_close(maps, expected_maps(model.vision_model, images, num_prefix_tokens), rtol=0, atol=0)
    assert str(tmp_path) not in json.dumps(backbone.config)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_model_with_text_is_tapped_by_its_vision_part(kind: str) -> None:
    model = two_towers(kind)
    images = random_images()
    expected = expected_maps(copy.deepcopy(model.vision_model), images, 1 if kind == "clip" else 0)
    with torch.no_grad():
        maps = list(TransformersBackbone(model, layers=(3, 1)).eval()(images))
    torch.testing.assert_close(maps, [expected[3], expected[1]], rtol=0, atol=0)


def test_a_folder_with_a_vision_model_is_loaded(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("dinov2_with_registers", **SIZES)
    model = randomise_parameters(transformers.AutoModel.from_config(config), std=0.1).eval()
    model.save_pretrained(tmp_path)
    images = random_images()
    backbone = create_backbone(f"transformers:{tmp_path}", layers=(1, 2)).eval()
    with torch.no_grad():
        maps = list(backbone(images))
    torch.testing.assert_close(maps, expected_maps(model, images, 5)[1:3], rtol=0, atol=0)


def test_preprocessing_is_read_from_the_folder(tmp_path: Path) -> None:
    model = two_towers("clip").vision_model
    model.save_pretrained(tmp_path)
    written = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2, "do_center_crop": True}
    written |= {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    preprocessing = create_backbone(f"transformers:{tmp_path}", layers=1).preprocessing
    assert preprocessing.mean == (0.1, 0.2, 0.3)
    assert preprocessing.std == (0.4, 0.5, 0.6)
    assert (preprocessing.interpolation, preprocessing.mode, preprocessing.crop_pct) == ("bilinear", "crop", 0.8)


def test_a_folder_without_preprocessing_is_told_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    two_towers("clip").vision_model.save_pretrained(tmp_path)
    backbone = create_backbone(f"transformers:{tmp_path}", layers=1)
    assert "no preprocessor config; using that of released clip_vision_model models" in caplog.text
    assert backbone.preprocessing.mean == CLIP_MEAN


@pytest.mark.parametrize(
    ("described", "kind", "mode", "crop_pct", "mean"),
    [
        ({}, "clip_vision_model", "crop", 1.0, CLIP_MEAN),
        ({}, "siglip_vision_model", "squash", 1.0, HALF),
        ({}, "dinov2", "crop", 0.875, IMAGENET_MEAN),
        ({"size": 224}, "clip_vision_model", "crop", 1.0, CLIP_MEAN),
        ({"size": 224}, "vit", "squash", 1.0, HALF),
        ({"size": {"height": 224, "width": 224}}, "clip_vision_model", "squash", 1.0, CLIP_MEAN),
        ({"size": {"shortest_edge": 256}, "crop_size": 224}, "dinov2", "crop", 0.875, IMAGENET_MEAN),
        ({"size": {"shortest_edge": 224}, "do_pad": True}, "clip_vision_model", "pad", 1.0, CLIP_MEAN),
        ({"do_normalize": False}, "clip_vision_model", "crop", 1.0, (0.0, 0.0, 0.0)),
    ],
)
def test_processor_configs_are_translated(
    described: dict[str, Any], kind: str, mode: str, crop_pct: float, mean: tuple[float, ...]
) -> None:
    preprocessing = read_preprocessing(described, kind=kind, size=(224, 224))
    assert (preprocessing.mode, preprocessing.crop_pct, preprocessing.mean) == (mode, crop_pct, mean)


@pytest.mark.parametrize(
    ("processor", "kind"),
    [
        ("CLIPImageProcessorPil", "clip_vision_model"),
        ("SiglipImageProcessorPil", "siglip_vision_model"),
        ("ViTImageProcessorPil", "vit"),
    ],
)
@pytest.mark.parametrize("shape", [(200, 331), (131, 75), (64, 64)])
def test_prepared_images_equal_the_librarys_own_processor(processor: str, kind: str, shape: tuple[int, int]) -> None:
    theirs = getattr(transformers, processor)()
    preprocessing = read_preprocessing(theirs.to_dict(), kind=kind, size=(224, 224))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    expected = torch.as_tensor(np.asarray(theirs(image)["pixel_values"][0]))
    torch.testing.assert_close(preprocessing(image), expected.float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "kind",
    ["clip", "siglip", "vit", "deit", "beit", "ijepa", "dinov2", "dinov2_reg", "dinov3", "internvl", "siglip2_naflex"],
)
def test_non_square_sizes_equal_the_librarys_own_resizing(kind: str) -> None:
    case = next(case for case in CASES if case.family == "transformers" and case.name == kind)
    model: Any = case.model()
    images = random_images(2, size=(32, 80))
    call = {"interpolate_pos_encoding": True} if kind in ("clip", "siglip", "vit", "deit", "beit", "ijepa") else {}
    with torch.no_grad():
        if kind == "siglip2_naflex":
            expected = case.hidden_states(model, images)
        else:
            expected = list(model(images, output_hidden_states=True, **call).hidden_states)
        features = case.backbone(model, (0, 3))(images)
    assert features.grids == ((2, 5), (2, 5))
    patches = [expected[0][:, case.num_prefix_tokens :], expected[3][:, case.num_prefix_tokens :]]
    torch.testing.assert_close(list(features.maps), patches, rtol=0, atol=0)


def test_an_image_size_becomes_the_native_size() -> None:
    backbone = create_backbone(
        "transformers:clip_vision_model", layers=1, pretrained=False, image_size=48, options=SIZES
    )
    assert backbone.image_size == backbone.preprocessing.size == (48, 48)
    assert type(backbone).from_config(backbone.config).image_size == (48, 48)


def test_attention_can_be_chosen() -> None:
    options = {**SIZES, "attn_implementation": "eager"}
    backbone: Any = create_backbone("transformers:clip_vision_model", layers=1, pretrained=False, options=options)
    assert backbone.model.config._attn_implementation == "eager"


def test_gradient_checkpointing_is_turned_off_again() -> None:
    backbone: Any = create_backbone("transformers:clip_vision_model", layers=1, pretrained=False, options=SIZES)
    blocks = backbone.model.encoder.layers
    backbone.set_gradient_checkpointing()
    assert all(block.gradient_checkpointing for block in blocks)
    backbone.set_gradient_checkpointing(False)
    assert not any(block.gradient_checkpointing for block in blocks)


def test_weights_that_are_missing_are_listed(tmp_path: Path) -> None:
    two_towers("clip").vision_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks weights of CLIPVisionModel.*encoder\.layers\.3\.layer_norm1\.bias"):
        create_backbone(f"transformers:{tmp_path}", layers=1, options={"num_hidden_layers": 4})


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel"])
def test_weights_that_would_be_cut_off_are_not_asked_for(kind: str, tmp_path: Path) -> None:
    config = transformers.ViTConfig(**SIZES)
    options = {"add_pooling_layer": False} if kind == "ViTModel" else {}
    model = randomise_parameters(getattr(transformers, kind)(config, **options))
    model.save_pretrained(tmp_path)
    backbone = create_backbone(f"transformers:{tmp_path}", layers=(1, 2))
    state = getattr(model, "vit", model).state_dict()
    for name, tensor in backbone.model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_options_that_change_shapes_of_pretrained_weights_are_told(tmp_path: Path) -> None:
    two_towers("clip").vision_model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not fit the model that its config and the options describe. Leave out"):
        create_backbone(f"transformers:{tmp_path}", layers=1, options={"intermediate_size": 48})


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "clip_vision_model"])
def test_fewer_blocks_can_be_asked_for(kind: str, tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, "num_hidden_layers": 4})
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    for name, pretrained in ((kind, False), (str(tmp_path), False), (str(tmp_path), True)):
        small = {key: SIZES[key] for key in ("hidden_size", "num_attention_heads", "image_size", "patch_size")}
        options = {"num_hidden_layers": 2} | (small if name == kind else {})
        backbone = create_backbone(f"transformers:{name}", layers=(1, -1), pretrained=pretrained, options=options)
        assert (backbone.num_blocks, backbone.layers) == (2, (1, 2))
        assert type(backbone).from_config(backbone.config).num_blocks == 2


def test_naflex_makes_no_tensor_on_the_host() -> None:
    fields = {key: value for key, value in SIZES.items() if key != "image_size"}
    config = transformers.AutoConfig.for_model("siglip2_vision_model", **fields, num_patches=9)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    backbone = TransformersBackbone(model, layers=(1, 2))
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.extend(kwargs.values()), with_kwargs=True)
    real = torch.tensor
    try:
        torch.tensor = lambda *_, **__: pytest.fail("a tensor was made from numbers of the host")  # type: ignore[assignment]
        model.forward = lambda *_, **__: None
        with pytest.raises(RuntimeError):
            backbone(torch.empty(2, 3, *backbone.image_size, device="meta"))
    finally:
        torch.tensor = real
    assert [tensor.device.type for tensor in seen] == ["meta", "meta"]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    transformers.AutoConfig.for_model("clip_vision_model", **SIZES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="transformers finds no weights for .*; give a name on the hub or a folder"):
        create_backbone(f"transformers:{tmp_path}", layers=1)
    create_backbone(f"transformers:{tmp_path}", layers=1, pretrained=False)


@pytest.mark.parametrize(
    ("file", "content"),
    [("pytorch_model.bin", b"<!DOCTYPE html>"), ("pytorch_model.bin", b""), ("model.safetensors", b"x")],
)
def test_a_damaged_file_of_weights_is_told_and_never_as_something_to_trust(
    file: str, content: bytes, tmp_path: Path
) -> None:
    transformers.CLIPVisionConfig(**SIZES).save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match="the weights of .* are no whole file of tensors .*; download them") as error:
        create_backbone(f"transformers:{tmp_path}", layers=1)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [(True, "with config.json. It says"), (False, "or a model type, such as 'clip_vision_model'. It says")],
)
def test_an_unknown_name_is_refused(pretrained: bool, message: str) -> None:
    with pytest.raises(ValueError, match=f"transformers finds no model './nowhere/at/all'.*{message}"):
        create_backbone("transformers:./nowhere/at/all", layers=1, pretrained=pretrained)


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(
        ValueError, match="option of CLIPVisionConfig 'hiden_size' is unknown; did you mean 'hidden_size'"
    ):
        create_backbone("transformers:clip_vision_model", layers=1, pretrained=False, options={"hiden_size": 8})


def test_a_model_type_that_is_not_known_points_to_the_module_family() -> None:
    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(
        ValueError, match="model type 'bert' is unknown to layerfuse; known: aimv2_vision_model, .*ModuleBackbone"
    ):
        TransformersBackbone(transformers.BertModel(config), layers=1)


def test_a_fixed_size_model_cannot_be_resized() -> None:
    with pytest.raises(ValueError, match="Aimv2VisionModel takes only 32x32 pixels, so image_size=48 is not possible"):
        create_backbone("transformers:aimv2_vision_model", layers=1, pretrained=False, image_size=48, options=SIZES)


def test_an_image_size_between_patches_is_refused() -> None:
    with pytest.raises(
        ValueError, match="image_size 50x50 is no multiple of the patch size 8x8; take for example 48x48"
    ):
        create_backbone("transformers:clip_vision_model", layers=1, pretrained=False, image_size=50, options=SIZES)


def test_the_block_list_is_found_by_structure_where_its_name_is_new() -> None:
    config = transformers.AutoConfig.for_model("clip_vision_model", **SIZES)

    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = config
            self.stages = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images

    assert TransformersBackbone(Renamed(), layers=-1).layers == (3,)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install layerfuse\[transformers\]"):
        create_backbone("transformers:clip_vision_model", layers=1, pretrained=False)
