"""The published code's image preparation, reproduced (goldens/README.md section 4)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from layerfuse.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing

# thin_wide has no golden without padding: the published code raises on images 1 px high. three_high without padding
# was recorded as read channels-first, a fault of the published code that is not reproduced (see below).
PADDED = ("gray", "palette", "rgba", "square", "tall", "thin_tall", "thin_wide", "three_high", "wide")
CROPPED = ("gray", "palette", "rgba", "square", "tall", "thin_tall", "wide")


def clip_preprocessing(size: int, mode: str) -> Preprocessing:
    """OpenAI CLIP's at another size."""
    return Preprocessing(size=(size, size), mean=CLIP_MEAN, std=CLIP_STD, mode={"pad": "pad", "nopad": "crop"}[mode])


@pytest.mark.parametrize(("mode", "names"), [("pad", PADDED), ("nopad", CROPPED)])
def test_pixel_values_equal_the_published_code(goldens: Path, mode: str, names: tuple[str, ...]) -> None:
    expected = load_file(goldens / "images" / "pixel_values_56.safetensors")
    preprocessing = clip_preprocessing(56, mode)
    for name in names:
        actual = preprocessing(Image.open(goldens / "images" / f"{name}.png"))
        torch.testing.assert_close(actual, expected[f"{mode}.{name}"], rtol=0, atol=1e-6, msg=f"{mode}.{name}")


def test_every_recorded_case_is_compared(goldens: Path) -> None:
    recorded = set(load_file(goldens / "images" / "pixel_values_56.safetensors"))
    compared = {f"pad.{name}" for name in PADDED} | {f"nopad.{name}" for name in CROPPED}
    assert recorded - compared == {"nopad.three_high"}


@pytest.mark.parametrize("name", ["wide", "tall"])
@pytest.mark.parametrize("mode", ["pad", "nopad"])
def test_resized_images_at_336_pixels_equal_the_published_code(goldens: Path, mode: str, name: str) -> None:
    expected = np.asarray(Image.open(goldens / "images" / f"after_resize_crop_336_{mode}_{name}.png"))
    actual = clip_preprocessing(336, mode).fit(Image.open(goldens / "images" / f"{name}.png"))
    np.testing.assert_array_equal(np.asarray(actual), expected)


def test_images_of_one_and_three_pixels_height_are_images_where_the_published_code_fails(goldens: Path) -> None:
    recorded = load_file(goldens / "images" / "pixel_values_56.safetensors")["nopad.three_high"]
    preprocessing = clip_preprocessing(56, "nopad")
    one = preprocessing(Image.open(goldens / "images" / "thin_wide.png"))
    three = preprocessing(Image.open(goldens / "images" / "three_high.png"))
    assert one.shape == three.shape == (3, 56, 56)
    assert (three - recorded).abs().max() > 0.1
