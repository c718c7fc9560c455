"""What is saved loads, as it was; what would not load is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from layerfuse import FusedEncoder, create_fuser
from layerfuse.backbones import Backbone, OpenClipBackbone, TransformersBackbone, create_backbone
from layerfuse.testing import random_images, randomise_parameters, tiny_backbone

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32}
FAMILIES = ("timm", "open_clip", "transformers", "module")


def _encoder(backbone: Backbone) -> FusedEncoder:
    count = len(backbone.layers)
    fuser = create_fuser("mmfuser", in_channels=backbone.embed_dim, num_layers=count, options={"num_heads": 4})
    return FusedEncoder(backbone, randomise_parameters(fuser)).eval()


def _vit(**options: Any) -> nn.Module:
    config = transformers.ViTConfig(**SIZES, patch_size=8)
    model: nn.Module = randomise_parameters(transformers.ViTModel._from_config(config, **options), std=0.1)
    return model


def _held(kind: str) -> nn.Module:
    vision = {**SIZES, "patch_size": 8}
    text = {key: SIZES[key] for key in ("hidden_size", "num_attention_heads", "intermediate_size")}
    text |= {"num_hidden_layers": 1, "vocab_size": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind.startswith(("CLIP", "Siglip")):
        both = transformers.CLIPConfig if kind.startswith("CLIP") else transformers.SiglipConfig
        config: Any = both(vision_config=vision, text_config=text)
    else:
        config = (transformers.ViTConfig if kind.startswith("ViT") else transformers.Dinov2Config)(**vision)
    model: nn.Module = randomise_parameters(getattr(transformers, kind)(config), std=0.1)
    return model


def _reloaded(encoder: FusedEncoder, folder: Path) -> FusedEncoder:
    """Save and load, and check that the same comes out, in the same types."""
    encoder.save_pretrained(folder)
    again = FusedEncoder.from_pretrained(folder)
    images = random_images(2, size=encoder.backbone.image_size)
    with torch.no_grad():
        torch.testing.assert_close(again(images), encoder(images), rtol=0, atol=0)
    return again


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_comes_back(family: str, tmp_path: Path) -> None:
    encoder = _encoder(tiny_backbone(family)).to(torch.bfloat16)
    again = _reloaded(encoder, tmp_path)
    tensors = {**dict(again.named_parameters()), **dict(again.named_buffers())}
    assert {name: tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point()} == dict.fromkeys(
        (name for name, tensor in tensors.items() if tensor.is_floating_point()), torch.bfloat16
    )


def test_a_dtype_for_each_weight_comes_back(tmp_path: Path) -> None:
    backbone = tiny_backbone("timm").to(torch.float64)
    encoder = _encoder(backbone)
    encoder.save_pretrained(tmp_path)
    again = FusedEncoder.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.backbone.parameters()} == {torch.float64}
    assert {parameter.dtype for parameter in again.fuser.parameters()} == {torch.float32}


def test_buffers_that_no_file_holds_get_the_dtype_they_had(tmp_path: Path) -> None:
    config = transformers.DINOv3ViTConfig(**SIZES, patch_size=8)
    backbone = TransformersBackbone(transformers.DINOv3ViTModel(config), layers=(1, 2))
    backbone.model.to(torch.bfloat16)
    rotary = {name: buffer.float() for name, buffer in backbone.named_buffers() if buffer.is_floating_point()}
    assert rotary
    for name, buffer in rotary.items():
        parent, _, child = name.rpartition(".")
        backbone.get_submodule(parent)._buffers[child] = buffer
    _encoder(backbone).save_pretrained(tmp_path)
    again = FusedEncoder.from_pretrained(tmp_path).backbone
    assert again.dtype == torch.bfloat16
    assert {buffer.dtype for name, buffer in again.named_buffers() if name in rotary} == {torch.float32}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_implementation_comes_back(attention: str, tmp_path: Path) -> None:
    encoder = _encoder(TransformersBackbone(_vit(attn_implementation=attention), layers=(1, 2)))
    model: Any = _reloaded(encoder, tmp_path).backbone.model
    assert model.config._attn_implementation == attention


def test_an_attention_implementation_that_is_not_here_is_told(tmp_path: Path) -> None:
    _encoder(TransformersBackbone(_vit(), layers=(1, 2))).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone"]["recipe"]["attn_implementation"] = "no_such_attention"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="saved with the attention implementation 'no_such_attention'.*write 'sdpa'"):
        FusedEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "kind",
    [
        *("ViTForImageClassification", "Dinov2ForImageClassification", "Dinov2Backbone", "CLIPForImageClassification"),
        *("SiglipForImageClassification", "CLIPModel", "CLIPVisionModelWithProjection"),
    ],
)
def test_a_model_that_the_user_held_loads(kind: str, tmp_path: Path) -> None:
    model = _held(kind) if kind != "CLIPVisionModelWithProjection" else _held("CLIPModel")
    if kind == "CLIPVisionModelWithProjection":
        model = transformers.CLIPVisionModelWithProjection(model.config.vision_config)  # type: ignore[arg-type, union-attr]
    _reloaded(_encoder(TransformersBackbone(model, layers=(1, 2))), tmp_path)


@pytest.mark.parametrize("part", ["backbone", "fuser", "backbone.model", "backbone.model.blocks.0"])
def test_compiled_parts_are_saved_as_what_they_are(part: str, tmp_path: Path) -> None:
    encoder = _encoder(tiny_backbone("timm"))
    parent, _, child = part.rpartition(".")
    setattr(encoder.get_submodule(parent), child, torch.compile(encoder.get_submodule(part), backend="eager"))
    again = _reloaded(encoder, tmp_path)
    assert not [name for name in again.state_dict() if "_orig_mod" in name]


def test_a_compiled_encoder_saves_itself(tmp_path: Path) -> None:
    encoder = _encoder(tiny_backbone("timm"))
    compiled: Any = torch.compile(encoder, backend="eager")
    compiled.save_pretrained(tmp_path)
    assert FusedEncoder.from_pretrained(tmp_path).state_dict().keys() == encoder.state_dict().keys()


def test_data_parallel_parts_are_saved_as_what_they_are(tmp_path: Path) -> None:
    encoder = _encoder(tiny_backbone("timm"))
    names = encoder.state_dict().keys()
    encoder.fuser = nn.DataParallel(encoder.fuser)  # type: ignore[assignment]
    encoder.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == names
    FusedEncoder.from_pretrained(tmp_path)


def test_tied_weights_are_saved(tmp_path: Path) -> None:
    encoder = _encoder(tiny_backbone("timm"))
    blocks: Any = encoder.backbone.model.blocks
    blocks[1].mlp = blocks[0].mlp
    _reloaded(encoder, tmp_path)


def _with_adapters(encoder: FusedEncoder) -> None:
    import peft

    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["qkv"]), encoder.backbone.model)


def _normalised(encoder: FusedEncoder) -> None:
    model: Any = encoder.backbone.model
    parametrizations.weight_norm(model.blocks[0].mlp.fc1)


def _pruned(encoder: FusedEncoder) -> None:
    model: Any = encoder.backbone.model
    prune.random_unstructured(model.blocks[0].mlp.fc1, "weight", 0.5)


def _widened(encoder: FusedEncoder) -> None:
    model: Any = encoder.backbone.model
    model.blocks[0].mlp.fc1 = nn.Linear(32, 5)


def _extended(encoder: FusedEncoder) -> None:
    encoder.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_adapters, r"Unexpected: .*base_layer.*It has adapters: merge them \(peft: model.merge_and_unload\(\)\)"),
        (_normalised, "Unexpected: .*parametrizations.*fold them in with torch.nn.utils.parametrize"),
        (_pruned, "Unexpected: .*weight_orig.*make that permanent with torch.nn.utils.prune.remove"),
        (_widened, r"Of another shape: .*fc1.weight \(5, 32\) instead of \(128, 32\)"),
        (_extended, "Unexpected: extra.bias, extra.weight.*Its modules were changed after they were built: undo that"),
    ],
)
def test_what_would_not_load_is_refused_before_anything_is_written(change: Any, message: str, tmp_path: Path) -> None:
    encoder = _encoder(tiny_backbone("timm"))
    change(encoder)
    with pytest.raises(ValueError, match=f"(?s)is not saved, since its config would build another model.*{message}"):
        encoder.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_without_content_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        encoder = _encoder(tiny_backbone("timm"))
    with pytest.raises(ValueError, match="there is nothing to save: .*are on the meta device; load weights first"):
        encoder.save_pretrained(tmp_path / "new")


def test_a_user_s_model_card_stays_and_an_earlier_model_goes(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("of an earlier model")
    _encoder(tiny_backbone("timm")).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_what_goes_to_the_hub_is_what_a_folder_gets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **options: Any) -> Any:
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path: Path, **options: Any) -> str:
            seen.update(options, files={path.name for path in Path(folder_path).iterdir()})
            return "the commit"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    encoder = _encoder(tiny_backbone("timm"))
    assert encoder.save_pretrained(tmp_path / "mine", push_to_hub=True, token="a", branch="b") == "the commit"
    assert seen["files"] == {"README.md", "config.json", "model.safetensors"}
    assert (seen["repo_id"], seen["token"], seen["revision"]) == ("mine", "a", "b")


def test_a_folder_of_the_first_version_loads(tmp_path: Path) -> None:
    encoder = _encoder(TransformersBackbone(_vit(), layers=(1, 2)))
    encoder.save_pretrained(tmp_path)
    # As commit 6df16e5 wrote it: no attention in the recipe, no dtypes in the file.
    config = json.loads((tmp_path / "config.json").read_text())
    del config["backbone"]["recipe"]["attn_implementation"]
    (tmp_path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = FusedEncoder.from_pretrained(tmp_path)
    images = random_images(2, size=32)
    with torch.no_grad():
        torch.testing.assert_close(again(images), encoder(images), rtol=0, atol=0)


def test_dtype_and_device_can_be_chosen(tmp_path: Path) -> None:
    encoder = _encoder(tiny_backbone("timm"))
    encoder.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, "bfloat16"):
        again = FusedEncoder.from_pretrained(tmp_path, dtype=dtype, device="cpu")
        assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert FusedEncoder.from_pretrained(tmp_path, dtype="auto", device_map={"": "cpu"}).backbone.dtype == torch.float32
    assert next(FusedEncoder.from_pretrained(tmp_path, device_map="meta").parameters()).is_meta


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "bf16"}, "dtype 'bf16' is no floating dtype of torch; give torch.bfloat16"),
        ({"dtype": torch.int8}, "dtype torch.int8 is no floating dtype"),
        ({"device": "nowhere"}, "'nowhere' is no device of torch; .*give 'cpu', 'cuda'"),
        ({"device_map": "auto"}, "'auto' is no device of torch; an encoder lies on one"),
        ({"device_map": {"backbone": 0}}, "splits the encoder, which lies on one device; give device="),
        ({"device": "cpu", "device_map": "cpu"}, "say the same; give one of them"),
    ],
)
def test_a_dtype_or_device_that_cannot_be_is_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        FusedEncoder.from_pretrained(tmp_path, **arguments)


def test_damaged_files_are_told(tmp_path: Path) -> None:
    _encoder(tiny_backbone("timm")).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="is not a whole safetensors file .*; write or download it anew"):
        FusedEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"backbone"')
    with pytest.raises(ValueError, match="is no valid JSON .*; write or download it anew"):
        FusedEncoder.from_pretrained(tmp_path)


def test_weights_of_other_shapes_are_listed(tmp_path: Path) -> None:
    _encoder(tiny_backbone("timm")).save_pretrained(tmp_path / "a")
    _encoder(tiny_backbone("timm", embed_dim=16)).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(ValueError, match=r"Of another shape: backbone.model.blocks.0.attn.proj.bias \(16,\) instead"):
        FusedEncoder.from_pretrained(tmp_path / "a")


def test_a_name_that_is_no_folder_and_not_on_the_hub_is_told() -> None:
    with pytest.raises(FileNotFoundError, match="nobody/nothing is no folder, and it could not be fetched from the"):
        FusedEncoder.from_pretrained("nobody/nothing")


@pytest.mark.parametrize("family", [*FAMILIES, "dinov3", "eva02"])
def test_an_encoder_built_on_meta_computes_the_same_once_weights_are_loaded(family: str) -> None:
    def build() -> FusedEncoder:
        if family == "dinov3":
            model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES, patch_size=8))
            return _encoder(TransformersBackbone(model, layers=(1, 2)))
        if family == "eva02":
            sizes = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 48}
            name = "eva02_base_patch16_clip_224"
            return _encoder(create_backbone(f"timm:{name}", layers=(1, 2), pretrained=False, options=sizes))
        return _encoder(tiny_backbone(family))

    encoder = build()
    with torch.device("meta"):
        again = build()
    again.to_empty(device="cpu")
    for buffer in again.buffers():
        buffer.fill_(99)
    again.load_state_dict(encoder.state_dict())
    images = random_images(2, size=encoder.backbone.image_size)
    with torch.no_grad():
        torch.testing.assert_close(again(images), encoder(images), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "pure_bf16"])
def test_open_clip_models_of_half_precision_run(precision: str) -> None:
    import open_clip

    sizes = {"width": 32, "layers": 3, "head_width": 16, "patch_size": 8, "image_size": 32}
    model = open_clip.create_model("ViT-B-32", precision=precision, vision_cfg=sizes)
    backbone = OpenClipBackbone(model.visual, layers=(1, 2))
    assert {feature_map.dtype for feature_map in backbone(random_images(1, size=32))} == {
        torch.float16 if precision == "fp16" else torch.bfloat16
    }
