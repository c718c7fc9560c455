"""Label images: the class of a patch after its picture's geometry, and what of them is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from layerfuse.analysis import patch_labels
from layerfuse.preprocessing import HALF, Preprocessing


def _drawn(rows: list[list[int]], block: int, mode: str = "L") -> Image.Image:
    """Draw class numbers as blocks of pixels."""
    grey = Image.fromarray(np.kron(np.array(rows, dtype=np.uint8), np.ones((block, block), dtype=np.uint8)))
    if mode == "L":
        return grey
    palette = Image.new("P", grey.size)
    palette.putpalette([255 - level for level in range(256) for _ in range(3)])  # colours that are no class numbers
    palette.putdata(list(grey.getdata()))
    return palette


def _preprocessing(size: tuple[int, int], **fields: object) -> Preprocessing:
    return Preprocessing(size=size, mean=HALF, std=HALF, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["L", "P"])
def test_the_commonest_class_of_a_cell_is_its_label(mode: str) -> None:
    image = _drawn([[0, 7, 7, 3], [0, 0, 7, 3], [255, 255, 5, 5], [255, 4, 255, 254]], 4, mode)
    # A 2×2 cell has 4 blocks: 3 of class 0; 7 twice and 3 twice, of which the lower; 255 three times; 5 twice.
    assert patch_labels(image, _preprocessing((32, 32)), (2, 2)).tolist() == [0, 3, -1, 5]


def test_labels_are_cut_squashed_and_padded_as_the_picture_is() -> None:
    wide = _drawn([[1, 2, 3, 4]], 8)
    assert patch_labels(wide, _preprocessing((16, 32), mode="squash"), (1, 4)).tolist() == [1, 2, 3, 4]
    assert patch_labels(wide, _preprocessing((8, 16)), (1, 2)).tolist() == [2, 3]  # the crop of the middle
    padded = patch_labels(wide, _preprocessing((32, 32), mode="pad"), (4, 4)).view(4, 4)
    # The picture is rows 12 to 19 of 32: half of the cells in the middle, of two that are equally common the lower.
    assert padded.tolist() == [[-1] * 4, [1, 2, 3, 4], [1, 2, 3, 4], [-1] * 4]
    border = _preprocessing((32, 32), mode="border", fill=(3, 3, 3))
    assert set(patch_labels(wide, border, (8, 4)).view(8, 4)[0].tolist()) == {-1}
    assert patch_labels(wide, border, (8, 4)).view(8, 4)[3].tolist() == [1, 2, 3, 4]


def test_labels_follow_the_picture_that_the_backbone_sees() -> None:
    noise = np.random.default_rng(0).integers(0, 4, (6, 9), dtype=np.uint8)
    grey = Image.fromarray(np.kron(noise, np.ones((8, 8), dtype=np.uint8)))
    for mode in ("crop", "squash", "pad", "border"):
        preprocessing = _preprocessing((48, 48), mode=mode, interpolation="nearest", geometry="torchvision")
        seen = preprocessing.pixels(grey)[0].view(6, 8, 6, 8)
        labels = patch_labels(grey, preprocessing, (6, 6)).view(6, 6)
        for row, column in (labels >= 0).nonzero().tolist():
            cell = seen[row, :, column]
            assert (cell == labels[row, column]).sum() == max((cell == number).sum() for number in range(4))


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("mode", ["crop", "squash", "pad", "border"])
def test_labels_go_with_pictures_of_any_number_of_channels(channels: int, mode: str) -> None:
    wide, grid = _drawn([[1, 2, 3, 4]], 8), (4, 4)
    many = Preprocessing(size=(32, 32), mean=(0.5,) * channels, std=(0.5,) * channels, mode=mode)  # type: ignore[arg-type]
    assert torch.equal(patch_labels(wide, many, grid), patch_labels(wide, _preprocessing((32, 32), mode=mode), grid))


def test_a_label_image_with_colours_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mode 'RGB'; class numbers are grey levels or palette indices"):
        patch_labels(Image.new("RGB", (8, 8)), _preprocessing((8, 8)), (1, 1))


def test_a_label_image_is_turned_with_its_picture(tmp_path: Path) -> None:
    labels = _drawn([[1, 2], [3, 4]], 8)
    exif = Image.Exif()
    exif[0x0112] = 3
    labels.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        turned.load()
    assert patch_labels(turned, _preprocessing((16, 16), upright=True), (2, 2)).tolist() == [4, 3, 2, 1]
    assert patch_labels(turned, _preprocessing((16, 16)), (2, 2)).tolist() == [1, 2, 3, 4]
    assert torch.equal(patch_labels(labels, _preprocessing((16, 16)), (2, 2)), torch.tensor([1, 2, 3, 4]))
