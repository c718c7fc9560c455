"""Resizing, cropping and padding against timm's and open_clip's own transforms: the geometry to the pixel.

Values agree within one grey level: versions of Pillow round bicubic resampling differently, and torchvision calls
Pillow as we do.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from layerfuse.backbones import _timm_facts, _transformers_facts, open_clip
from layerfuse.preprocessing import CLIP_MEAN, CLIP_STD, HALF, Preprocessing
from layerfuse.preprocessing import preprocessing as module

SIZES = [(24, 24), (21, 21), (24, 16)]


def pictures(count: int, *, least: int = 1, most: int = 200, seed: int = 0) -> list[Image.Image]:
    """Coordinates as colours, so that one pixel of offset is many grey levels; then noise in blue."""
    generator, made = random.Random(seed), []
    for _ in range(count):
        width, height = generator.randint(least, most), generator.randint(least, most)
        rows, columns = np.mgrid[:height, :width]
        noise = np.random.default_rng(width).integers(0, 256, (height, width))
        pixels = np.stack([columns * 37 % 256, rows * 29 % 256, noise], axis=-1).astype(np.uint8)
        made.append(Image.fromarray(pixels))
    return made


def assert_alike(ours: Preprocessing, theirs: Callable[[Image.Image], Any], images: list[Image.Image]) -> None:
    for image in images:
        expected = theirs(image).numpy() * np.reshape(ours.std, (3, 1, 1)) + np.reshape(ours.mean, (3, 1, 1))
        actual = np.asarray(ours.fit(image)).transpose(2, 0, 1)
        assert actual.shape == expected.shape
        assert np.abs(actual - np.round(expected * 255)).max() <= 1, f"{image.size} -> {ours}"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("mode", "crop_pct"), [("center", 1.0), ("center", 0.9), ("squash", 0.9), ("border", 1.0), ("border", 0.8)]
)
def test_pixels_are_those_of_timm(size: tuple[int, int], mode: str, crop_pct: float) -> None:
    from timm.data import create_transform

    config = {"input_size": (3, *size), "mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic"}
    theirs = create_transform(**config, crop_pct=crop_pct, crop_mode=mode)
    ours = _timm_facts.preprocessing_of(config | {"crop_pct": crop_pct, "crop_mode": mode}, size)
    # A picture that is scaled to no row at all is an error of timm's border.
    assert_alike(ours, theirs, pictures(60, least=7 if mode == "border" else 1))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("fill", [0, 90])
def test_pixels_are_those_of_open_clip(size: tuple[int, int], mode: str, fill: int) -> None:
    from open_clip import image_transform

    theirs = image_transform(size, is_train=False, resize_mode=mode, interpolation="bicubic", fill_color=fill)
    ours = open_clip.preprocessing_of({"resize_mode": mode, "interpolation": "bicubic", "fill_color": fill}, size)
    assert_alike(ours, theirs, pictures(40, least=7 if mode == "longest" else 1))


def test_the_published_example_is_cropped_as_timm_crops_it() -> None:
    """640×427 at 224: torchvision rounds 55.5 to 56, transformers to 55."""
    image = pictures(1)[0].resize((640, 427))
    shifted = Preprocessing(size=(224, 224), mean=CLIP_MEAN, std=CLIP_STD, geometry="torchvision")
    scaled = image.resize((335, 224), Image.Resampling.BICUBIC)

    for prepare, left in ((shifted, 56), (replace(shifted, geometry="transformers"), 55)):
        expected = scaled.crop((left, 0, left + 224, 224))
        np.testing.assert_array_equal(np.asarray(prepare.fit(image)), np.asarray(expected))


def published(
    timm_name: str, open_clip_name: str, tag: str, processor: dict[str, Any], kind: str
) -> list[Preprocessing]:
    """What timm, open_clip and transformers say of one published checkpoint."""
    import open_clip as library
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    found = resolve_data_config({}, pretrained_cfg=get_pretrained_cfg(timm_name).to_dict())
    size = found["input_size"][1:]
    return [
        _timm_facts.preprocessing_of(found, size),
        open_clip.preprocessing_of(library.get_pretrained_cfg(open_clip_name, tag), size),
        _transformers_facts.read_preprocessing(processor, kind=kind, size=size),
    ]


def test_one_published_checkpoint_is_prepared_alike_in_three_libraries() -> None:
    processor = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}  # openai/clip-vit-large-patch14-336
    processor |= {"size": 336, "crop_size": 336, "do_center_crop": True, "do_resize": True, "do_normalize": True}
    timm, clip, transformers = published(
        "vit_large_patch14_clip_quickgelu_336.openai",
        "ViT-L-14-336-quickgelu",
        "openai",
        processor,
        "clip_vision_model",
    )
    for image in pictures(6, least=80):
        np.testing.assert_array_equal(timm(image), clip(image))
        # Where the crop's offset is a half, one rounds it up and the other down.
        aligned = replace(transformers, geometry="torchvision")
        np.testing.assert_array_equal(timm(image), aligned(image))
        square = image.resize((200, 200))
        np.testing.assert_array_equal(timm(square), transformers(square))


def test_what_the_libraries_say_of_siglip_differs_as_the_docs_say() -> None:
    processor = {"image_mean": HALF, "image_std": HALF, "resample": 3, "do_resize": True}
    processor |= {"size": {"height": 384, "width": 384}}  # google/siglip-so400m-patch14-384
    timm, clip, transformers = published(
        "vit_so400m_patch14_siglip_384.webli", "ViT-SO400M-14-SigLIP-384", "webli", processor, "siglip_vision_model"
    )
    assert (timm.mode, timm.crop_pct) == ("crop", 0.9)
    for image in pictures(3, least=80):
        np.testing.assert_array_equal(clip(image), transformers(image))
        assert np.abs(np.asarray(timm(image)) - np.asarray(clip(image))).max() > 0.1
        np.testing.assert_array_equal(timm.changed(mode="squash", crop_pct=1.0)(image), clip(image))


def test_configs_of_old_checkpoints_keep_their_meaning() -> None:
    old = Preprocessing.from_dict(
        {"size": [24, 24], "mean": CLIP_MEAN, "std": CLIP_STD, "mode": "squash", "crop_pct": 0.5}
    )

    assert (old.geometry, old.fill, old.upright) == ("transformers", None, False)
    image = pictures(1)[0]
    expected = image.resize((24, 24), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(old.fit(image)), np.asarray(expected))


def padded_whole(prepare: Preprocessing, image: Image.Image) -> Image.Image:
    """LLaVA's expand2square, then a resize of the whole canvas."""
    edge = max(image.size)
    canvas = Image.new("RGB", (edge, edge), (122, 116, 104))
    canvas.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
    height, width = prepare.size
    return canvas.resize((width, height), Image.Resampling[prepare.interpolation.upper()])


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"])
def test_padding_in_steps_is_padding_at_once(interpolation: Any) -> None:
    prepare = Preprocessing((24, 24), CLIP_MEAN, CLIP_STD, interpolation=interpolation, mode="pad")
    for image in pictures(60):
        np.testing.assert_array_equal(np.asarray(prepare.fit(image)), np.asarray(padded_whole(prepare, image)))


@pytest.mark.parametrize("mode", ["pad", "crop", "squash", "border"])
@pytest.mark.parametrize("geometry", ["transformers", "torchvision"])
def test_the_way_for_large_pictures_gives_the_same_within_two_grey_levels(
    mode: Any, geometry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = Preprocessing((24, 16), CLIP_MEAN, CLIP_STD, mode=mode, geometry=geometry, crop_pct=0.9)
    images = [
        *pictures(40),
        *(image.resize((3, 200)) for image in pictures(3)),
        *(i.resize((200, 3)) for i in pictures(3)),
    ]
    usual = [np.asarray(prepare.fit(image)).astype(int) for image in images]
    monkeypatch.setattr(module, "_MAX_PIXELS", 1)

    for image, expected in zip(images, usual, strict=True):
        assert np.abs(np.asarray(prepare.fit(image)).astype(int) - expected).max() <= 2, image.size


@pytest.mark.parametrize("mode", ["pad", "crop", "squash", "border"])
@pytest.mark.parametrize("size", [(60_000, 100), (100, 60_000), (60_000, 3), (3, 60_000)])
def test_long_pictures_take_little_memory(mode: Any, size: tuple[int, int]) -> None:
    stripe = Image.new("RGB", size, (255, 0, 0))
    largest = 0
    resize = Image.Image.resize

    def watched(self: Image.Image, size: Any, *given: Any, **named: Any) -> Image.Image:
        nonlocal largest
        largest = max(largest, self.width * self.height, size[0] * size[1])
        return resize(self, size, *given, **named)

    prepare = Preprocessing((336, 336), CLIP_MEAN, CLIP_STD, mode=mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "resize", watched)
        fitted = prepare.fit(stripe)
    assert fitted.size == (336, 336)
    assert np.asarray(fitted)[168, 168, 0] > 100
    assert largest <= 2**26
