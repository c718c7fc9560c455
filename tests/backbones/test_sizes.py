"""Other sizes and aspect ratios, at construction and in a call: what each library makes of them, bit for bit."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers

import layerfuse
from layerfuse.testing import random_images, randomise_parameters
from tests.backbones.zoo import CASES, NUM_BLOCKS, Case, timm_model

LAYERS = (0, 1, NUM_BLOCKS)
GRIDS = ((2, 3), (1, 5), (4, 4))
# Of these the library resamples no position embeddings once they are built.
FIXED = {"open_clip-clip", "open_clip-coca", "transformers-aimv2"}
RESIZED = [case for case in CASES if str(case) not in FIXED]
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def their_hidden_states(case: Case, model: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """All layers of a copy that the library itself was told the size of."""
    timm_part = getattr(model, "trunk", model)
    if hasattr(timm_part, "set_input_size"):
        timm_part.set_input_size(img_size=tuple(images.shape[2:]))
    with torch.no_grad():
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            return list(model(images, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states)
        return case.hidden_states(model, images)


def assert_same(features: layerfuse.FeatureMaps, expected: list[torch.Tensor], case: Case) -> None:
    prefix = case.num_prefix_tokens
    for index, layer in enumerate(LAYERS):
        torch.testing.assert_close(features[index], expected[layer][:, prefix:], rtol=0, atol=0)
        if prefix:
            torch.testing.assert_close(features.prefix[index], expected[layer][:, :prefix], rtol=0, atol=0)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("case", RESIZED, ids=str)
def test_a_size_at_construction_gives_the_librarys_hidden_states(case: Case, grid: tuple[int, int]) -> None:
    model = case.model()
    size = (grid[0] * case.patch_size, grid[1] * case.patch_size)
    images = random_images(2, size=size)
    backbone = layerfuse.create_backbone(case.family, model, layers=LAYERS, image_size=size, copy=True)
    assert backbone.image_size == backbone.preprocessing.size == size
    with torch.no_grad():
        features = backbone(images)
    assert features.grids == (grid,) * 3
    assert_same(features, their_hidden_states(case, model, images), case)


def dynamic(name: str, patch_size: int, num_prefix_tokens: int) -> Case:
    like = next(case for case in CASES if str(case) == "timm-clip")
    size = 3 * patch_size
    build = timm_model(name, img_size=size, dynamic_img_size=True)
    return Case(name, "timm", build, like.hidden_states, num_prefix_tokens, patch_size, size)


ANY_SIZE = [case for case in RESIZED if case.family == "transformers" or case.name in ("dinov3", "intern")]
ANY_SIZE += [
    dynamic("vit_large_patch14_clip_quickgelu_336", 14, 1),
    dynamic("vit_base_patch16_siglip_224", 16, 0),
    dynamic("eva02_base_patch16_clip_224", 16, 1),
    dynamic("vit_small_patch14_reg4_dinov2", 14, 5),
    dynamic("aimv2_large_patch14_224", 14, 0),
    dynamic("vit_pe_core_base_patch16_224", 16, 1),
]


@pytest.mark.parametrize("case", ANY_SIZE, ids=str)
def test_sizes_of_single_calls_give_the_librarys_hidden_states(case: Case) -> None:
    model = case.model()
    backbone = layerfuse.create_backbone(case.family, model, layers=LAYERS, copy=True)
    timm_part: Any = model
    timm_part.set_input_size = None  # what it makes of the size in the call
    for grid in ((3, 3), *GRIDS):
        images = random_images(2, size=(grid[0] * case.patch_size, grid[1] * case.patch_size))
        with torch.no_grad():
            features = backbone(images)
        assert features.grids == (grid,) * 3
        call = {}
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters and grid != (3, 3):
            call = {"interpolate_pos_encoding": True}
        with torch.no_grad():
            if case.family == "transformers" and "naflex" not in case.name:
                expected = list(timm_part(images, output_hidden_states=True, **call).hidden_states)
            else:
                expected = case.hidden_states(timm_part, images)
        assert_same(features, expected, case)


@pytest.mark.parametrize("case", [case for case in CASES if str(case) in FIXED], ids=str)
def test_a_model_that_cannot_be_resized_says_so(case: Case) -> None:
    with pytest.raises(ValueError, match=r"takes only \d+x\d+ pixels"):
        layerfuse.create_backbone(case.family, case.model(), layers=1, image_size=(64, 32))


def test_aimv2_of_native_resolution_takes_any_size() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": NUM_BLOCKS, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.Aimv2VisionConfig(**sizes, image_size=48, patch_size=16, is_native=True)
    model = randomise_parameters(transformers.AutoModel.from_config(config), std=0.1).eval()
    images = random_images(1, size=(32, 80))
    with torch.no_grad():
        expected = model(images, output_hidden_states=True).hidden_states
        features = layerfuse.create_backbone(model, layers=LAYERS)(images)
    assert features.grids == ((2, 5),) * 3
    torch.testing.assert_close(list(features), [expected[layer] for layer in LAYERS], rtol=0, atol=0)


SAVED = {
    "vit_large_patch14_clip_quickgelu_336": 14,
    "vit_base_patch16_siglip_224": 16,
    "vit_small_patch14_reg4_dinov2": 14,
    "eva02_base_patch16_clip_224": 16,
    "vit_small_patch16_dinov3": 16,
    "vit_base_patch16_rope_mixed_224": 16,
    "vit_pe_core_base_patch16_224": 16,
    "aimv2_large_patch14_224": 14,
    "beit_base_patch16_224": 16,
    "vit_relpos_small_patch16_224": 16,
    "naflexvit_base_patch16_gap": 16,
}


@pytest.mark.parametrize(("name", "patch"), SAVED.items())
def test_a_timm_checkpoint_of_another_size_is_resampled_as_timm_loads_it(name: str, patch: int, tmp_path: Path) -> None:
    saved = {**TINY, "img_size": 3 * patch}
    model = randomise_parameters(timm.create_model(name, num_classes=0, **saved), std=0.1)
    timm.models.save_for_hf(model, tmp_path, model_args=saved)
    size = (2 * patch, 5 * patch)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=size, num_classes=0).eval()
    images = random_images(1, size=size)
    file = tmp_path / "weights.pth"
    torch.save(model.state_dict(), file)
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, indices=2, intermediates_only=True, output_fmt="NLC")
        for source, options in ((f"local-dir:{tmp_path}", {}), (name, {**saved, "checkpoint_path": str(file)})):
            backbone = layerfuse.create_backbone(
                f"timm:{source}", layers=(1, 2), pretrained=source != name, image_size=size, options=options
            )
            torch.testing.assert_close(list(backbone(images)), expected, rtol=0, atol=0)


def test_a_timm_file_of_another_size_than_the_model_says_how_to_load_it(tmp_path: Path) -> None:
    name = "vit_base_patch16_siglip_224"
    torch.save(timm.create_model(name, num_classes=0, **TINY, img_size=48).state_dict(), tmp_path / "weights.pth")
    options = {**TINY, "checkpoint_path": str(tmp_path / "weights.pth")}
    with pytest.raises(ValueError, match="do not fit 'vit_base_patch16_siglip_224' .*say theirs in the options"):
        layerfuse.create_backbone(f"timm:{name}", layers=1, pretrained=False, options=options)


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model", "dinov2", "siglip2_vision_model"])
def test_a_transformers_checkpoint_of_another_size_is_resampled_in_the_call(kind: str, tmp_path: Path) -> None:
    case = next(case for case in CASES if case.family == "transformers" and case.model().config.model_type == kind)
    model: Any = case.model()
    model.save_pretrained(tmp_path)
    images = random_images(1, size=(32, 80))
    backbone = layerfuse.create_backbone(f"transformers:{tmp_path}", layers=LAYERS, image_size=(32, 80))
    with torch.no_grad():
        assert_same(backbone(images), their_hidden_states(case, model, images), case)


TEXT = {"context_length": 4, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1}
NATIVE = {"image_size": 56, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14}


def open_clip_folder(vision: dict[str, Any], folder: Path) -> None:
    clip = randomise_parameters(open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), dict(TEXT)), std=0.1)
    if "timm_model_name" in vision:
        clip = randomise_parameters(open_clip.CustomTextCLIP(16, vision, dict(TEXT)), std=0.1)
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT}, "preprocess_cfg": {}}
    if "timm_model_name" in vision:
        config["model_cfg"]["custom_text"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("vision", "patch"),
    [
        (NATIVE, 14),
        ({"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "none", "image_size": 160}, 16),
    ],
    ids=["native", "timm"],
)
def test_an_open_clip_checkpoint_of_another_size_is_resampled_as_open_clip_loads_it(
    vision: dict[str, Any], patch: int, tmp_path: Path
) -> None:
    open_clip_folder(vision, tmp_path)
    size = (2 * patch, 3 * patch)
    theirs = open_clip.create_model(f"local-dir:{tmp_path}", force_image_size=size).visual.eval()
    backbone = layerfuse.create_backbone(f"open_clip:local-dir:{tmp_path}", layers=(1, 2), image_size=size)
    images = random_images(1, size=size)
    with torch.no_grad():
        expected = theirs.forward_intermediates(images, indices=[0, 1], output_fmt="NLC", intermediates_only=True)
        features = backbone(images)
    assert features.grids == ((2, 3),) * 2
    torch.testing.assert_close(list(features), list(expected["image_intermediates"]), rtol=0, atol=0)


def test_sizes_that_open_clip_would_not_resample_are_refused(tmp_path: Path) -> None:
    open_clip_folder(NATIVE, tmp_path)
    with pytest.raises(
        ValueError, match="resamples no position embeddings from a grid of 4x4 patches to 2x8, which has"
    ):
        layerfuse.create_backbone(f"open_clip:local-dir:{tmp_path}", layers=1, image_size=(28, 112))


def test_a_copy_of_a_resized_backbone_is_rebuilt_at_its_size() -> None:
    for case in RESIZED:
        size = (2 * case.patch_size, 3 * case.patch_size)
        model = case.model()
        backbone = layerfuse.create_backbone(case.family, model, layers=LAYERS, image_size=size)
        if case.family != "open_clip":  # of a tower that is handed over nobody knows how it was made
            rebuilt = layerfuse.backbones.backbone_from_config(copy.deepcopy(backbone.config)).eval()
            rebuilt.load_state_dict(backbone.state_dict())
            with torch.no_grad():
                images = random_images(1, size=size)
                torch.testing.assert_close(rebuilt(images).maps, backbone(images).maps, rtol=0, atol=0)
