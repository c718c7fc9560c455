"""FusedEncoder: backbone and fuser joined, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerfuse import FUSERS, FusedEncoder, check_fuser_fits, create_encoder, create_fuser
from layerfuse.testing import random_images, randomise_parameters, tiny_backbone

LAYERS = (3, 1, 0, -2)


def _encoder(fuser: str = "mmfuser") -> FusedEncoder:
    backbone = tiny_backbone("timm", layers=LAYERS[:1] if fuser == "select" else LAYERS)
    options = {"num_heads": 4} if fuser == "mmfuser" else None
    fused = create_fuser(fuser, in_channels=backbone.embed_dim, num_layers=len(backbone.layers), options=options)
    return FusedEncoder(backbone, randomise_parameters(fused)).eval()


@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_encoder_gives_the_fusers_output_and_reloads_to_the_bit(fuser: str, tmp_path: Path) -> None:
    encoder = _encoder(fuser)
    images = random_images(2, size=encoder.backbone.image_size)
    tokens = encoder(images)
    torch.testing.assert_close(tokens, encoder.fuser(encoder.backbone(images)), rtol=0, atol=0)
    cost = encoder.cost()
    assert tokens.shape == (2, cost.num_tokens, encoder.out_channels)
    encoder.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    again = FusedEncoder.from_pretrained(tmp_path)
    assert again.config == encoder.config
    assert again.preprocessing == encoder.preprocessing
    torch.testing.assert_close(again(images), tokens, rtol=0, atol=0)


def test_saving_leaves_no_partial_file_and_overwrites(tmp_path: Path) -> None:
    encoder = _encoder()
    encoder.save_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_fuser_for_other_layers_or_widths_is_refused() -> None:
    backbone = tiny_backbone("timm", layers=LAYERS)
    for in_channels, num_layers in ((backbone.embed_dim, 3), (2 * backbone.embed_dim, 5)):
        fuser = create_fuser("average", in_channels=in_channels, num_layers=num_layers)
        message = f"built for {num_layers} maps of widths .*{in_channels}.*build the fuser"
        for refuse in (FusedEncoder, check_fuser_fits):
            with pytest.raises(ValueError, match=message):
                refuse(backbone, fuser)


def test_fuser_for_the_tapped_layers_fits() -> None:
    backbone = tiny_backbone("timm", layers=LAYERS)
    check_fuser_fits(backbone, create_fuser("average", in_channels=backbone.embed_dim, num_layers=len(LAYERS)))


def test_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no config.json and no model.safetensors; give a folder"):
        FusedEncoder.from_pretrained(tmp_path)


def test_foreign_config_is_refused(tmp_path: Path) -> None:
    _encoder().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(
        ValueError, match="has the keys \\['model_type'\\]; a FusedEncoder's has 'backbone' and 'fuser'"
    ):
        FusedEncoder.from_pretrained(tmp_path)


def test_weights_that_do_not_cover_the_encoder_are_listed(tmp_path: Path) -> None:
    encoder = _encoder("scalar_mix")
    encoder.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in weights if name.startswith("fuser."))
    weights["stray"] = weights.pop(lost)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"Missing: {lost}. Unexpected: stray. Of another"):
        FusedEncoder.from_pretrained(tmp_path)


def test_create_encoder_builds_from_names() -> None:
    encoder = create_encoder(
        "timm:vit_tiny_patch16_224",
        layers=(2, -2),
        fuser="concat",
        fuser_options={"norm": "layer"},
        pretrained=False,
        image_size=32,
        backbone_options={"depth": 4},
    )
    assert encoder.backbone.layers == (2, 3)
    assert encoder(random_images(1, size=32)).shape == (1, 4, 2 * 192)


def test_encoder_compiles_to_one_graph() -> None:
    encoder = _encoder()
    images = random_images(2, size=encoder.backbone.image_size)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), encoder(images), rtol=1e-5, atol=1e-5)


def test_gradient_reaches_images_and_every_parameter() -> None:
    encoder = _encoder()
    images = random_images(1, size=encoder.backbone.image_size).requires_grad_()
    encoder(images).square().sum().backward()
    assert images.grad is not None
    starved = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert not starved
