"""Backbones from a name, a config or a model that the user holds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from torch import nn

from layerfuse import create_backbone, list_backbones
from layerfuse.backbones import (
    BACKBONES,
    Backbone,
    ModuleBackbone,
    OpenClipBackbone,
    TimmBackbone,
    TransformersBackbone,
)
from layerfuse.testing import TinyViT, random_images, randomise_parameters
from tests.run_support import run_python

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 32,
    "max_position_embeddings": 8,
}
MODULE = {"embed_dim": 32, "num_prefix_tokens": 1, "patch_size": 8, "image_size": 32, "tail": ("norm", "head")}


def timm_model() -> nn.Module:
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 32, "patch_size": 8}
    return timm.create_model("vit_base_patch16_224", pretrained=False, **sizes)


def clip_model() -> nn.Module:
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))


def llava_model() -> nn.Module:
    text = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    text |= {"intermediate_size": 16, "vocab_size": 64}
    vision = {"model_type": "clip_vision_model", **VISION}
    return transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))


def open_clip_model() -> nn.Module:
    vision = {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 4, "vocab_size": 16, "width": 8, "heads": 1, "layers": 1}
    return open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text)


HELD: dict[str, tuple[Any, dict[str, Any], type[Backbone]]] = {
    "timm": (timm_model, {}, TimmBackbone),
    "CLIPVisionModel": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION)),
        {},
        TransformersBackbone,
    ),
    "CLIPModel": (clip_model, {}, TransformersBackbone),
    "LLaVA": (llava_model, {}, TransformersBackbone),
    "open_clip": (open_clip_model, {}, OpenClipBackbone),
    "its visual tower": (lambda: open_clip_model().visual, {}, OpenClipBackbone),
    "module": (TinyViT, MODULE, ModuleBackbone),
}
every_held_model = pytest.mark.parametrize("kind", HELD)


def hidden_states(backbone: Backbone) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(backbone(random_images()))


@every_held_model
def test_a_model_that_is_handed_over_is_tapped_by_the_family_of_its_class(kind: str) -> None:
    build, options, family = HELD[kind]
    model = randomise_parameters(build(), std=0.1)
    whole = copy.deepcopy(model)
    backbone = create_backbone(model, layers=(2, 1), options=options)
    assert type(backbone) is family
    assert (backbone.layers, backbone.num_blocks, backbone.training) == ((2, 1), 3, False)
    named = create_backbone(backbone.family, whole, layers=(1, 2), options=options)
    torch.testing.assert_close(hidden_states(backbone), hidden_states(named)[::-1], rtol=0, atol=0)


@every_held_model
def test_a_model_that_is_handed_over_is_cut_unless_it_is_copied(kind: str) -> None:
    build, options, _ = HELD[kind]
    model = build().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copied = create_backbone(model, layers=1, options=options, copy=True, dtype="float64")
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    cut = create_backbone(model, layers=1, options=options)
    assert len(model.state_dict()) < len(before)
    torch.testing.assert_close(hidden_states(cut.double()), hidden_states(copied), rtol=0, atol=0)
    # What is cut is the model itself, what is copied is not.
    assert {id(weight) for weight in cut.parameters()} <= {id(weight) for weight in model.parameters()}
    assert {id(weight) for weight in copied.parameters()}.isdisjoint(id(weight) for weight in model.parameters())


@pytest.mark.parametrize(
    "config", [transformers.CLIPVisionConfig(**VISION), transformers.CLIPConfig(vision_config=VISION)]
)
@pytest.mark.parametrize("family", [(), ("transformers",)])
def test_a_config_of_transformers_gives_random_weights(config: Any, family: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    backbone = create_backbone(*family, config, layers=(0, -2), image_size=48)
    assert isinstance(backbone, TransformersBackbone)
    assert (backbone.layers, backbone.image_size) == ((0, 2), (48, 48))
    torch.manual_seed(1)
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    expected = create_backbone(model, layers=(0, -2))
    torch.testing.assert_close(hidden_states(backbone), hidden_states(expected), rtol=0, atol=0)


def test_a_family_may_take_a_model_that_is_not_of_its_library() -> None:
    backbone = create_backbone("module", timm_model(), layers=1, options=MODULE | {"tail": ()})
    assert isinstance(backbone, ModuleBackbone)


def test_a_subclass_belongs_to_the_family_of_its_base() -> None:
    class Mine(transformers.CLIPVisionModel):
        """A user's own."""

    assert isinstance(create_backbone(Mine(transformers.CLIPVisionConfig(**VISION)), layers=1), TransformersBackbone)


def test_device_and_dtype_are_those_asked_for() -> None:
    named = {"layers": 1, "pretrained": False, "options": {"depth": 1, "embed_dim": 6}}
    backbone = create_backbone("timm:vit_tiny_patch16_224", **named, device="meta", dtype="bfloat16")
    assert {(weight.device.type, weight.dtype) for weight in backbone.parameters()} == {("meta", torch.bfloat16)}
    with pytest.raises(ValueError, match="'gpu' is no device of torch"):
        create_backbone("timm:vit_tiny_patch16_224", **named, device="gpu")
    with pytest.raises(ValueError, match="dtype 'int8' is no floating dtype"):
        create_backbone("timm:vit_tiny_patch16_224", **named, dtype="int8")


def test_family_and_name_apart_are_deprecated() -> None:
    with pytest.warns(DeprecationWarning) as caught:
        backbone = create_backbone("module", "tiny-vit", layers=1, pretrained=False, options=MODULE)
    assert isinstance(backbone, ModuleBackbone)
    (warning,) = caught
    assert str(warning.message) == (
        'create_backbone("module", "tiny-vit", …) is deprecated; write create_backbone("module:tiny-vit", …).'
    )
    assert warning.filename == __file__


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("vit_tiny_patch16_224",), {}, ValueError, "'vit_tiny_patch16_224' says no family; write 'family:name'"),
        (("timm:",), {}, ValueError, "'timm:' says no family"),
        (("tim:vit",), {}, ValueError, "backbone family 'tim' is unknown; did you mean 'timm'"),
        ((7,), {}, TypeError, "made from a name such as .* a model or a config of transformers; got a int"),
        ((TinyViT,), {}, TypeError, "got a type"),
        (("timm", 7), {}, TypeError, r"the backbone family 'timm' takes a model \(nn.Module\) or its name, got a int"),
        ((TinyViT(), "timm"), {}, TypeError, "takes one model; the first of two arguments names its family, got a Tin"),
        (
            (TinyViT(),),
            {"embed_dim": 32},
            ValueError,
            "tapped by the backbone family 'module', which must be told its num_prefix_tokens, patch_size, image_size;",
        ),
        (
            (TinyViT(),),
            {"patchsize": 8},
            ValueError,
            "option of ModuleBackbone 'patchsize' is unknown; did you mean 'pat",
        ),
        ((TinyViT(),), {"_recipe": {}}, ValueError, "option of ModuleBackbone '_recipe' is unknown"),
        (("timm", TinyViT()), {}, ValueError, "TinyViT is no Vision Transformer with one list of blocks"),
        ((timm_model(),), {"depth": 2}, ValueError, "option of TimmBackbone 'depth' is unknown"),
    ],
)
def test_what_is_no_backbone_says_what_to_give(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        create_backbone(*arguments, layers=1, options=options)
    assert len(str(caught.value)) < 400


def test_open_clip_names_have_their_tag_behind_a_slash_or_a_colon() -> None:
    options = {"width": 32, "layers": 2, "head_width": 16}
    for name in ("ViT-L-14/openai", "ViT-L-14:openai", "ViT-L-14"):
        backbone = create_backbone(f"open_clip:{name}", layers=-1, pretrained=False, options=options)
        assert backbone.patch_size == (14, 14)


def test_listed_names_can_be_built_and_match_the_pattern() -> None:
    names = list_backbones("timm", "*clip*336*")
    assert "timm:vit_large_patch14_clip_quickgelu_336.openai" in names
    assert all("clip" in name and "336" in name for name in names)
    assert not any("resnet" in name or "convnext" in name for name in list_backbones("timm"))
    assert "open_clip:ViT-L-14/openai" in list_backbones("open_clip", "ViT-L*")
    assert "open_clip:RN50/openai" not in list_backbones("open_clip")
    assert "transformers:clip_vision_model" in list_backbones("transformers")
    assert list_backbones("module", "tiny*") == ["module:tiny-vit"]
    assert {name.partition(":")[0] for name in list_backbones()} == {"module", "open_clip", "timm", "transformers"}
    assert list_backbones(pattern="*tiny-vit*") == ["module:tiny-vit"]
    with pytest.raises(ValueError, match="backbone family 'tim' is unknown"):
        list_backbones("tim")


def test_names_of_a_library_that_is_missing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    assert not any(name.startswith("open_clip:") for name in list_backbones())
    with pytest.raises(ImportError, match=r"pip install layerfuse\[open-clip\]"):
        list_backbones("open_clip")


@pytest.mark.parametrize(
    "name",
    [
        "timm:beit_base_patch16_224",
        "timm:deit_tiny_distilled_patch16_224",
        "timm:vit_base_patch16_rope_224",
        "timm:eva02_tiny_patch14_224",
    ],
)
def test_every_kind_of_listed_timm_model_is_tapped(name: str) -> None:
    assert any(listed.startswith(name) for listed in list_backbones("timm"))
    with torch.device("meta"):
        assert create_backbone(name, layers=(0, -2), pretrained=False).num_blocks == 12


def test_families_of_other_packages_know_their_models() -> None:
    class Encoder(TinyViT):
        """Of another package, which is this test's own."""

    class Mine(ModuleBackbone):
        """Its family."""

        family = "mine"
        library = __name__.partition(".")[0]

    BACKBONES.register("mine")(Mine)
    try:
        assert isinstance(create_backbone(Encoder(), layers=1, options=MODULE), Mine)
        assert not isinstance(create_backbone(TinyViT(), layers=1, options=MODULE), Mine)
    finally:
        del BACKBONES._entries["mine"]


PACKAGE = """
from torch import nn
from layerfuse import FUSERS, Fuser
from layerfuse.backbones import MODULES, ModuleBackbone
from layerfuse.testing import TinyViT

@MODULES.register("its-vit")
class ItsViT(TinyViT):
    pass

class ItsFamily(ModuleBackbone):
    family = "its_family"
    library = "its_package"

@FUSERS.register("its_fuser")
class ItsFuser(Fuser):
    def fuse(self, features):
        return features.maps[0]
"""
ANNOUNCED = """
[layerfuse.backbones]
its_family = its_package:ItsFamily
[layerfuse.modules]
its-vit = its_package:ItsViT
[layerfuse.fusers]
its_fuser = its_package:ItsFuser
"""
USE = """
import sys
import layerfuse
facts = {"embed_dim": 32, "num_prefix_tokens": 1, "patch_size": 8, "image_size": 32}
print("its_fuser" in layerfuse.list_fusers(), layerfuse.list_backbones("module", "its*"), "its_package" in sys.modules)
encoder = layerfuse.create_encoder(
    "module:its-vit", layers=(1, 2), fuser="its_fuser", pretrained=False, backbone_options=facts
)
from its_package import ItsViT
held = layerfuse.create_backbone(ItsViT(), layers=1, options=facts)
print(type(encoder.backbone.model) is ItsViT, encoder.num_tokens(), held.family)
"""


def test_entry_points_make_names_known_without_an_import(tmp_path: Path) -> None:
    (tmp_path / "its_package.py").write_text(PACKAGE)
    announced = tmp_path / "its_package-1.0.dist-info"
    announced.mkdir()
    (announced / "METADATA").write_text("Metadata-Version: 2.1\nName: its-package\nVersion: 1.0\n")
    (announced / "entry_points.txt").write_text(ANNOUNCED)
    (tmp_path / "use.py").write_text(USE)  # beside the package, so that Python finds it
    assert run_python(str(tmp_path / "use.py"), folder=tmp_path).splitlines() == [
        "True ['module:its-vit'] False",
        "True 16 its_family",
    ]
