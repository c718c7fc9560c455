"""Preprocessing of images of any mode and shape; the published code's results are in test_goldens_images."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from layerfuse.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    Preprocessing,
    StackedPreprocessing,
    interpolation_name,
)

CLIP = Preprocessing(size=(28, 28), mean=CLIP_MEAN, std=CLIP_STD)
MODES = ("crop", "squash", "pad")
edges = st.integers(1, 90)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@given(width=edges, height=edges, rows=st.integers(1, 40), columns=st.integers(1, 40), mode=st.sampled_from(MODES))
def test_every_image_comes_out_at_the_size_and_finite(
    width: int, height: int, rows: int, columns: int, mode: Any
) -> None:
    preprocessing = dataclasses.replace(CLIP, size=(rows, columns), mode=mode)
    prepared = preprocessing(noise(width, height))
    assert prepared.shape == (3, rows, columns)
    assert prepared.dtype == torch.float32
    assert prepared.isfinite().all()


@given(width=edges, height=edges, crop_pct=st.floats(0.5, 1.0))
def test_a_margin_changes_what_is_kept_but_not_the_size(width: int, height: int, crop_pct: float) -> None:
    assert dataclasses.replace(CLIP, crop_pct=crop_pct)(noise(width, height)).shape == (3, 28, 28)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("width", "height"), [(1, 50), (50, 1), (3, 50), (50, 3), (1, 1)])
def test_images_of_one_and_three_pixels_work(mode: Any, width: int, height: int) -> None:
    assert dataclasses.replace(CLIP, mode=mode)(noise(width, height)).shape == (3, 28, 28)


@pytest.mark.parametrize("image_mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_images_of_every_mode_are_converted_to_rgb(image_mode: str) -> None:
    image = noise(40, 30, image_mode)
    torch.testing.assert_close(CLIP(image), CLIP(image.convert("RGB")), rtol=0, atol=0)


def test_an_image_of_the_size_is_not_resampled() -> None:
    image = noise(28, 28)
    for mode in MODES:
        assert np.array_equal(np.asarray(dataclasses.replace(CLIP, mode=mode).fit(image)), np.asarray(image))


def test_padding_has_the_mean_colour_and_the_image_in_the_middle() -> None:
    image = Image.new("RGB", (28, 14), (255, 0, 0))
    fitted = np.asarray(dataclasses.replace(CLIP, mode="pad").fit(image))
    assert (
        fitted[0, 0].tolist() == fitted[-1, -1].tolist() == [int(value * 255) for value in CLIP_MEAN] == [122, 116, 104]
    )
    assert (fitted[7:21] == [255, 0, 0]).all()


def test_padding_for_a_size_that_is_not_square_keeps_the_aspect_ratio() -> None:
    image = Image.new("RGB", (20, 20), (255, 0, 0))
    fitted = np.asarray(dataclasses.replace(CLIP, size=(20, 40), mode="pad").fit(image))
    assert (fitted[:, 10:30] == [255, 0, 0]).all()
    assert (fitted[:, :10] == [122, 116, 104]).all()


def test_cropping_keeps_the_centre() -> None:
    pixels = np.zeros((28, 84, 3), dtype=np.uint8)
    pixels[:, 28:56] = 255
    assert (np.asarray(CLIP.fit(Image.fromarray(pixels))) == 255).all()


def test_values_are_normalised_by_mean_and_std() -> None:
    prepared = CLIP(Image.new("RGB", (5, 5), (255, 0, 51)))
    expected = [(1 - CLIP_MEAN[0]) / CLIP_STD[0], -CLIP_MEAN[1] / CLIP_STD[1], (0.2 - CLIP_MEAN[2]) / CLIP_STD[2]]
    torch.testing.assert_close(prepared[:, 3, 4], torch.tensor(expected), rtol=0, atol=1e-6)


def test_a_batch_is_the_images_one_by_one() -> None:
    images = [noise(30, 20), noise(7, 90), noise(28, 28, "L")]
    torch.testing.assert_close(CLIP.batch(images), torch.stack([CLIP(image) for image in images]), rtol=0, atol=0)


def test_fields_survive_json() -> None:
    preprocessing = Preprocessing((14, 28), HALF, CLIP_STD, interpolation="lanczos", mode="squash", crop_pct=0.9)
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


@pytest.mark.parametrize(
    ("given_name", "expected"),
    [
        ("bicubic", "bicubic"),
        ("BILINEAR", "bilinear"),
        (3, "bicubic"),
        (2, "bilinear"),
        (1, "lanczos"),
        ("random", "bicubic"),
    ],
)
def test_filter_names_of_the_libraries_are_understood(given_name: str | int, expected: str) -> None:
    assert interpolation_name(given_name) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (28,)}, r"size=\(28,\) has 1 entries; expected 2"),
        ({"mean": (0.5, 0.5)}, r"mean=\(0.5, 0.5\) has 2 entries, std=.* has 3; give one of each"),
        ({"size": (0, 28)}, r"size=\(0, 28\) is empty"),
        ({"std": (0.5, 0.0, 0.5)}, r"std=\(0.5, 0.0, 0.5\) has an entry <= 0"),
        ({"crop_pct": 0.0}, r"crop_pct=0.0 is outside \(0, 1\]"),
        ({"crop_pct": 1.5}, r"crop_pct=1.5 is outside \(0, 1\]"),
        ({"mode": "sqash"}, "Preprocessing mode 'sqash' is unknown; did you mean 'squash'"),
        ({"interpolation": "cubic"}, "Preprocessing interpolation 'cubic' is unknown; did you mean 'bicubic'"),
    ],
)
def test_impossible_fields_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CLIP, **change)


def test_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match="Preprocessing key 'sise' is unknown; did you mean 'size'"):
        Preprocessing.from_dict({"sise": (28, 28)})


def test_a_missing_key_is_refused() -> None:
    with pytest.raises(ValueError, match="Preprocessing config lacks mean, std; it has size"):
        Preprocessing.from_dict({"size": (28, 28)})


@pytest.mark.parametrize("size", [(0, 8), (8, 0), (0, 0)])
@pytest.mark.parametrize("mode", ["crop", "squash", "pad"])
def test_an_image_without_pixels_is_refused(mode: Any, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"image of {size[0]}x{size[1]} pixels.*nothing to show"):
        Preprocessing(size=(28, 28), mean=(0.5,) * 3, std=(0.5,) * 3, mode=mode)(Image.new("RGB", size))


def test_what_is_no_pil_image_is_refused() -> None:
    with pytest.raises(TypeError, match="Preprocessing takes PIL images, got ndarray; open files with PIL.Image.open"):
        CLIP(np.zeros((28, 28, 3), dtype=np.uint8))  # type: ignore[arg-type]


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="batch got no images"):
        CLIP.batch([])


def test_normalised_pixels_are_those_of_the_whole_preprocessing() -> None:
    preprocessing = Preprocessing(size=(6, 8), mean=CLIP_MEAN, std=CLIP_STD)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), dtype=np.uint8))
    expected = torch.stack([preprocessing(Image.fromarray(each.numpy())) for each in pixels])

    assert torch.equal(preprocessing.normalize(pixels.permute(0, 3, 1, 2)), expected)
    assert expected[0, 1, 2, 3] == (pixels[0, 2, 3, 1].float() / 255 - CLIP_MEAN[1]) / CLIP_STD[1]
    with pytest.raises(ValueError, match=r"pixels are torch.float32; Preprocessing.normalize takes uint8"):
        preprocessing.normalize(expected)
    with pytest.raises(ValueError, match=r"shape \(6, 8, 3\); Preprocessing.normalize takes \(..., 3, height, width\)"):
        preprocessing.normalize(pixels[0])
    with pytest.raises(ValueError, match=r"shape \(6, 8\); Preprocessing"):
        preprocessing.normalize(pixels[0, ..., 0])


numbers = st.floats(0.01, 1, allow_nan=False)
triples = st.tuples(numbers, numbers, numbers)
preprocessings = st.builds(
    Preprocessing, size=st.tuples(edges, edges), mean=triples, std=triples, mode=st.sampled_from(MODES)
)


@given(parts=st.lists(preprocessings, min_size=1, max_size=3), count=st.integers(1, 3), seed=st.integers(0, 99))
def test_pixels_that_are_normalised_later_give_the_same_bits(parts: list[Any], count: int, seed: int) -> None:
    """Against `(pixels / 255 - mean) / std` of one picture in numpy, with zeros where a backbone sees less."""
    generator = np.random.default_rng(seed)
    pictures = [Image.fromarray(generator.integers(0, 256, (9, 13, 3), dtype=np.uint8)) for _ in range(count)]
    whole = parts[0] if len(parts) == 1 else StackedPreprocessing(tuple(parts))
    pixels = torch.stack([whole.pixels(picture) for picture in pictures])
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    expected = np.zeros((count, 3 * len(parts), *whole.size), dtype=np.float32)
    for row, picture in enumerate(pictures):
        for place, part in enumerate(parts):
            fitted = np.asarray(part.fit(picture)).astype(np.float32) / np.float32(255)
            values = (fitted - np.float32(part.mean)) / np.float32(part.std)
            height, width = part.size
            expected[row, 3 * place : 3 * place + 3, :height, :width] = values.transpose(2, 0, 1)

    normalised = whole.normalize(pixels)
    assert normalised.dtype == torch.float32
    assert torch.equal(normalised, torch.from_numpy(expected))
    assert torch.equal(normalised, whole.batch(pictures))


def test_pixels_of_several_backbones_have_the_size_of_the_largest() -> None:
    part = Preprocessing(size=(8, 8), mean=CLIP_MEAN, std=CLIP_STD)
    stacked = StackedPreprocessing((part, part.changed(mode="squash")))
    with pytest.raises(ValueError, match=r"shape \(6, 8, 9\), and those of several backbones are 8 x 8"):
        stacked.normalize(torch.zeros(6, 8, 9, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"takes \(..., 6, height, width\)"):
        stacked.normalize(torch.zeros(3, 8, 8, dtype=torch.uint8))
