"""Pictures of any mode, depth and orientation as RGB: right values, or the reason why not."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import pytest
from PIL import Image

from layerfuse.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from layerfuse.preprocessing.pixels import MAX_EDGE, is_16_bit, orientation, to_rgb, upright

PREPARE = Preprocessing(size=(4, 4), mean=CLIP_MEAN, std=CLIP_STD, mode="squash")
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def ramp() -> np.ndarray[Any, Any]:
    return np.arange(256, dtype=np.uint16).reshape(16, 16) * 257


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_16_bits_are_scaled_to_8(mode: str) -> None:
    raw = ramp().astype(">u2" if mode.endswith("B") else "<u2").tobytes()
    image = Image.frombytes(mode, (16, 16), raw)

    expected = np.arange(256).reshape(16, 16, 1).repeat(3, axis=2)
    assert is_16_bit(image)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), expected)


# Every Pillow writes 16 bits as PPM from 32-bit integers, and not all of them from others.
@pytest.mark.parametrize(("ending", "dtype"), [("png", np.uint16), ("tiff", np.uint16), ("ppm", np.int32)])
def test_16_bits_of_a_file_are_scaled_to_8(ending: str, dtype: type) -> None:
    file = io.BytesIO()
    Image.fromarray(ramp().astype(dtype)).save(file, format=ending)
    image = Image.open(io.BytesIO(file.getvalue()))

    np.testing.assert_array_equal(np.asarray(to_rgb(image))[..., 1], np.arange(256).reshape(16, 16))
    assert PREPARE(image).isfinite().all()


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_values_without_a_known_range_are_refused_with_the_way_out(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode is '{mode}'.* scale them to 0…255 and save 8 bits"):
        PREPARE.fit(Image.new(mode, (5, 5)))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV"]
)
def test_every_mode_of_eight_bits_gives_its_colours(mode: str) -> None:
    white = to_rgb(
        Image.new("RGBA" if mode == "RGBa" else "LA" if mode == "La" else "RGB", (3, 2), "white").convert(mode)
    )

    assert white.mode == "RGB"
    assert white.getpixel((0, 0)) == WHITE


def test_transparency_is_dropped_without_a_warning() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = b"\x00\x80"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb = to_rgb(image)
    assert [rgb.getpixel((0, 0)), rgb.getpixel((1, 0))] == [RED, GREEN]
    assert to_rgb(Image.new("RGBA", (1, 1), (*BLUE, 0))).getpixel((0, 0)) == BLUE


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_picture_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} pixels \(width x height\) has nothing to show"):
        PREPARE.fit(Image.new("RGB", size))


def test_a_picture_that_is_too_long_is_refused() -> None:
    assert PREPARE.fit(Image.new("RGB", (MAX_EDGE, 1))).size == (4, 4)
    with pytest.raises(ValueError, match=r"no edge may be longer than 131,072; cut it or scale it down"):
        PREPARE.fit(Image.new("L", (1, MAX_EDGE + 1)))


def corners(image: Image.Image) -> list[Any]:
    return [image.getpixel(place) for place in ((0, 0), (image.width - 1, 0), (0, image.height - 1))]


def turned(number: Any, form: str = "png") -> Image.Image:
    """Red in the upper left corner of the upright picture, green right of it, blue below, stored as Exif says."""
    picture = Image.new("RGB", (6, 4))
    for place, colour in (((0, 0), RED), ((5, 0), GREEN), ((0, 3), BLUE)):
        picture.putpixel(place, colour)
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transposes that undo the turns
    stored = picture.transpose(Image.Transpose(back[number])) if number in back else picture
    exif = Image.Exif()
    exif[0x0112] = number
    file = io.BytesIO()
    stored.save(file, format=form, exif=exif, lossless=True)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("form", ["png", "webp"])
@pytest.mark.parametrize("number", range(1, 9))
def test_exif_orientations_are_turned_upright_on_request(number: int, form: str) -> None:
    image = turned(number, form)
    rgb = to_rgb(image)

    assert orientation(rgb) == number
    assert corners(upright(rgb)) == [RED, GREEN, BLUE]
    assert orientation(upright(rgb)) == 1
    assert upright(upright(rgb)).size == (6, 4)


def test_preprocessing_reads_as_stored_or_upright() -> None:
    stored = Preprocessing(size=(6, 4), mean=CLIP_MEAN, std=CLIP_STD, interpolation="nearest", mode="squash")
    turn = Preprocessing(
        size=(4, 6), mean=CLIP_MEAN, std=CLIP_STD, interpolation="nearest", mode="squash", upright=True
    )

    assert corners(stored.fit(turned(6))) == [GREEN, (0, 0, 0), RED]
    assert corners(turn.fit(turned(6))) == [RED, GREEN, BLUE]
    assert not Preprocessing.from_dict({"size": [2, 2], "mean": CLIP_MEAN, "std": CLIP_STD}).upright


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("number", [0, 9, 65535])
def test_nonsense_in_exif_turns_nothing(number: int) -> None:
    assert orientation(turned(number)) == 1
    for block in (b"", b"Exif\x00\x00", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"nonsense" * 9, b"\xff" * 200_000):
        image = Image.new("RGB", (2, 2))
        image.info["exif"] = block
        assert orientation(image) == 1
