"""FusedEncoder: backbone and fuser joined, saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from layerfuse import (
    FUSERS,
    FeatureMaps,
    FusedEncoder,
    Fuser,
    check_fuser_fits,
    create_encoder,
    create_fuser,
    list_fusers,
    tap,
)
from layerfuse.testing import random_images, randomise_parameters, tiny_backbone

LAYERS = (3, 1, 0, -2)
FUSER_OPTIONS = {"mmfuser": {"num_heads": 4}, "text_gated": {"condition_channels": 6}}


def _encoder(fuser: str = "mmfuser") -> FusedEncoder:
    backbone = tiny_backbone("timm", layers=LAYERS[:1] if fuser == "select" else LAYERS)
    options = FUSER_OPTIONS.get(fuser)
    fused = create_fuser(fuser, in_channels=backbone.embed_dim, num_layers=len(backbone.layers), options=options)
    return FusedEncoder(backbone, randomise_parameters(fused)).eval()


@pytest.mark.parametrize("fuser", sorted(FUSERS))
def test_encoder_gives_the_fusers_output_and_reloads_to_the_bit(fuser: str, tmp_path: Path) -> None:
    encoder = _encoder(fuser)
    images = random_images(2, size=encoder.backbone.image_size)
    width = encoder.fuser.condition_channels
    condition = None if width is None else torch.linspace(-1, 1, 2 * width).view(2, width)
    tokens = encoder(images, condition)
    torch.testing.assert_close(tokens, encoder.fuser(encoder.backbone(images), condition), rtol=0, atol=0)
    cost = encoder.cost()
    assert tokens.shape == (2, cost.num_tokens, encoder.out_channels)
    encoder.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    again = FusedEncoder.from_pretrained(tmp_path)
    assert again.config == encoder.config
    assert again.preprocessing == encoder.preprocessing
    torch.testing.assert_close(again(images, condition), tokens, rtol=0, atol=0)


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


SMALL = {"depth": 4, "embed_dim": 32, "num_heads": 2, "img_size": (32, 48), "patch_size": 8, "dynamic_img_size": True}


def _created(**given: Any) -> FusedEncoder:
    named = {"layers": (1, -2), "pretrained": False, "backbone_options": SMALL, "fuser": "average"}
    return create_encoder("timm:vit_tiny_patch16_224", **(named | given))


def test_a_created_encoder_is_in_evaluation_mode_and_knows_tokens_and_grid() -> None:
    encoder = _created()
    assert not any(module.training for module in encoder.modules())
    assert (encoder.num_tokens(), encoder.grid()) == (24, (4, 6))
    assert (encoder.num_tokens(64), encoder.grid(64)) == (64, (8, 8))
    assert (encoder.num_tokens((40, 16)), encoder.grid((40, 16))) == (10, (5, 2))
    assert encoder.backbone.grids((40, 16)) == ((5, 2), (5, 2))
    assert encoder.cost((40, 16)).num_tokens == 10
    assert encoder(torch.zeros(1, 3, 40, 16)).shape == (1, 10, 32)
    with pytest.raises(ValueError, match="images of 40x41 pixels do not fit"):
        encoder.num_tokens((40, 41))


def test_without_layers_an_encoder_taps_what_the_fusers_source_does() -> None:
    sizes = {"depth": 24, "embed_dim": 16, "num_heads": 1, "img_size": 16}
    encoder = _created(layers=None, fuser="mmfuser", fuser_options={"num_heads": 2}, backbone_options=sizes)
    assert encoder.backbone.layers == (3, 8, 13, 18, 23)
    with pytest.raises(
        ValueError, match=r"fuser 'average' has no published choice of layers for 4 blocks; name them, .*spread"
    ):
        _created(layers=None)


def test_maps_unfold_the_tapped_layers_and_the_fused_tokens_on_their_grids() -> None:
    encoder = _created(fuser="concat")
    images = random_images(2, size=(40, 16))
    features, fused = encoder.backbone(images), encoder.maps(images)
    maps = encoder.backbone.maps(images)
    assert [tuple(each.shape) for each in maps] == [(2, 32, 5, 2)] * 2
    assert tuple(fused.shape) == (2, 64, 5, 2)
    for each, tokens in zip((*maps, fused), (*features, encoder(images)), strict=True):
        torch.testing.assert_close(each[:, :, 3, 1], tokens[:, 3 * 2 + 1], rtol=0, atol=0)


def test_a_fused_map_has_the_tokens_of_cells_only() -> None:
    encoder = _created(fuser="token_concat")
    images = random_images(1, size=(32, 48))
    tokens, front = encoder(images), encoder.fuser.extra_tokens(encoder.backbone.grids()).front
    assert front > 0 and tokens.shape[1] > front
    expected = tokens[:, front : front + 24].transpose(1, 2)
    torch.testing.assert_close(encoder.maps(images).flatten(2), expected, rtol=0, atol=0)


def test_tokens_without_a_grid_have_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = _created()
    monkeypatch.setattr(type(encoder.fuser), "out_grid", lambda self, grids: None)
    with pytest.raises(ValueError, match=r"fuser 'average' lie on no grid.*encoder.backbone.maps\(images\)"):
        encoder.maps(random_images(1, size=(32, 48)))


def test_a_fuser_that_is_built_already_is_taken() -> None:
    fuser = create_fuser("concat", in_channels=32, num_layers=2).train()
    encoder = _created(fuser=fuser)
    assert encoder.fuser is fuser
    assert not fuser.training
    with pytest.raises(ValueError, match="built for 2 maps of widths .* but the backbone taps layers"):
        _created(fuser=fuser, layers=(1, 2, 3))
    with pytest.raises(ValueError, match="fuser_options are for a fuser that is built by its name"):
        _created(fuser=fuser, fuser_options={"norm": "layer"})
    with pytest.raises(TypeError, match="fuser is a ABCMeta; give its name, or a Fuser that is built"):
        _created(fuser=type(fuser))


def test_an_encoder_goes_to_the_device_and_dtype_asked_for() -> None:
    encoder = _created(fuser="scalar_mix", device="meta", dtype=torch.float16)
    assert {(weight.device.type, weight.dtype) for weight in encoder.parameters()} == {("meta", torch.float16)}


def test_a_model_that_is_handed_over_becomes_the_encoders() -> None:
    model = randomise_parameters(timm.create_model("vit_tiny_patch16_224", pretrained=False, **SMALL), std=0.1).eval()
    with torch.no_grad(), tap(model, (1, -2)) as tapped:
        model(images := random_images(size=(32, 48)))
    expected = tapped.features(grid=(4, 6), num_prefix_tokens=1)
    whole = set(model.state_dict())
    encoder = create_encoder(model, layers=(1, -2), fuser="average", copy=True)
    assert set(model.state_dict()) == whole
    for each in (encoder, create_encoder("timm", model, layers=(1, -2), fuser="average")):
        with torch.no_grad():
            torch.testing.assert_close(each(images), torch.stack(expected.maps).mean(0), rtol=0, atol=1e-6)
    assert set(model.state_dict()) < whole


def test_a_frozen_backbone_leaves_the_fuser_to_learn() -> None:
    encoder = _created(fuser="scalar_mix").freeze_backbone()
    assert isinstance(encoder, FusedEncoder)
    encoder.train()
    assert (encoder.backbone.training, encoder.fuser.training) == (False, True)
    assert {name.partition(".")[0] for name, weight in encoder.named_parameters() if weight.requires_grad} == {"fuser"}


def test_pictures_of_any_kind_are_prepared_for_the_encoder() -> None:
    encoder = _created(dtype="float64")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each) for each in pixels]
    expected = encoder.preprocessing.batch(pictures).double()
    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for given in (pictures, iter(pictures), pixels, list(pixels), tensors, tuple(tensors), [pictures[0], tensors[1]]):
        images = encoder.prepare(given)
        assert images.dtype == torch.float64
        torch.testing.assert_close(images, expected, rtol=0, atol=0)
    for given in (pictures[0], pixels[0], tensors[0]):
        torch.testing.assert_close(encoder.prepare(given), expected[:1], rtol=0, atol=0)
    grey = encoder.prepare(pictures[0].convert("L"))
    for given in (np.asarray(pictures[0].convert("L")), torch.from_numpy(np.array(pictures[0].convert("L")))[None]):
        torch.testing.assert_close(encoder.prepare(given), grey, rtol=0, atol=0)
    assert _created(fuser="select", layers=1, device="meta").prepare(pictures).device.type == "meta"


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ("cat.jpg", TypeError, r"images are a str; give PIL images \(PIL.Image.open of a file\), arrays or tensors"),
        (["cat.jpg"], TypeError, "images are a str"),
        (7, TypeError, "images are a int"),
        ([], ValueError, "got no images"),
        (
            torch.zeros(3, 8, 8),
            ValueError,
            "dtype float32, of which nobody can tell what is white; give uint8",
        ),
        (np.zeros((8, 8, 3), np.uint16), ValueError, "dtype uint16"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), ValueError, r"shape \(8, 8, 3\); give a tensor \(3, height, width\)"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"shape \(3, 8, 8\); give an array \(height, width, 3\)"),
        (np.zeros(8, np.uint8), ValueError, r"shape \(8,\); give an array"),
    ],
)
def test_what_is_no_picture_is_refused(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tiny_backbone("module").prepare(images)


def test_the_call_of_0_1_still_builds_and_says_the_new_one() -> None:
    with pytest.warns(DeprecationWarning) as caught:
        encoder = create_encoder(
            "timm", "vit_tiny_patch16_224", layers=(1, 2), fuser="average", pretrained=False, options=SMALL
        )
    assert encoder.backbone.num_blocks == 4
    assert [str(warning.message) for warning in caught] == [
        'create_encoder("timm", "vit_tiny_patch16_224", …) is deprecated; write '
        'create_encoder("timm:vit_tiny_patch16_224", …).',
        "options is deprecated; write backbone_options.",
    ]
    assert {warning.filename for warning in caught} == {__file__}


def test_a_fuser_that_is_unknown_is_said_before_a_backbone_is_built() -> None:
    with pytest.raises(ValueError, match="fuser 'mmfusr' is unknown; did you mean 'mmfuser'"):
        create_encoder("timm:no_such_model", layers=1, fuser="mmfusr")
    assert list_fusers() == sorted(FUSERS)


def test_a_condition_reaches_the_fuser() -> None:
    @FUSERS.register("gated_by_text")
    class Gated(Fuser):
        """The last map times what a text says."""

        condition_channels = 2

        def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
            assert condition is not None
            return features.maps[-1] * condition.sum(-1)[:, None, None]

    try:
        encoder, images = _created(fuser="gated_by_text"), random_images(2, size=(32, 48))
        with torch.no_grad():
            expected = encoder.backbone(images).maps[-1] * torch.tensor([3.0, -1.0])[:, None, None]
            tokens = encoder(images, torch.tensor([[1.0, 2.0], [0.5, -1.5]]))
        torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
        with pytest.raises(ValueError, match="fuser 'gated_by_text' needs a condition"):
            encoder(images)
    finally:
        del FUSERS._entries["gated_by_text"]
