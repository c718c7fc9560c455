"""Letters that are written into pictures: where they stand, how high they are, and what is read of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from layerfuse.analysis import LETTERS, Lettering, probe_letters, write_letters
from layerfuse.features import FeatureMaps


def _written(height: int, *, count: int | None = None, seed: int = 0, **grids: tuple[int, int]) -> Lettering:
    blank = Image.new("RGB", (160, 96), (90, 120, 40))
    random = torch.Generator().manual_seed(seed)
    return write_letters(blank, height, grid=grids.pop("grid", (12, 20)), count=count, random=random, **grids)


@pytest.mark.parametrize("height", [5, 9, 14, 24])
def test_letters_are_as_high_as_asked_and_stand_in_their_cells(height: int) -> None:
    written = _written(height)
    pixels = np.asarray(written.picture).astype(int)
    grey = (pixels == pixels[..., :1]).all(-1)  # paper and ink; the picture has colour
    assert len(written.cells) > 0
    for cell in written.cells.tolist():
        y, x = (cell // 20 + 0.5) * 8, (cell % 20 + 0.5) * 8
        column = slice(int(x - height / 2), int(x + height / 2) + 1)
        around = pixels[int(y - 0.7 * height) - 2 : int(y + 0.7 * height) + 3, column, 0]
        plate = grey[int(y - 0.7 * height) - 2 : int(y + 0.7 * height) + 3, column]
        rows = plate.all(1)
        paper = np.bincount(around[rows][0]).argmax()
        inked = (abs(around[rows] - paper) > 60).any(1)
        assert abs(int(inked.sum()) - height) <= 1


def test_words_do_not_touch_and_stay_in_the_picture() -> None:
    written = _written(10, coarsest=(3, 5))
    rows, columns = written.cells // 20, written.cells % 20
    large = set(zip((rows // 4).tolist(), (columns // 4).tolist(), strict=True))
    assert len(large) == len(written.cells)
    # Three letters with paper around them, and a quarter of a cell to either side.
    for edge, middles, half in ((96, rows, 7.5), (160, columns, 17.5)):
        assert (middles + 0.5).min() * 8 >= half + 2 and (middles + 0.5).max() * 8 <= edge - half - 2


def test_letters_come_from_the_generator_and_some_of_the_places_are_taken() -> None:
    first, again, other = _written(8, count=7), _written(8, count=7), _written(8, count=7, seed=1)
    assert first.picture.tobytes() == again.picture.tobytes() and torch.equal(first.letters, again.letters)
    assert first.picture.tobytes() != other.picture.tobytes()
    assert len(first.cells) == len(first.letters) == 7
    many = torch.cat([_written(5, seed=seed).letters for seed in range(8)])
    shares = many.bincount(minlength=len(LETTERS)) / len(many)
    assert ((shares - 1 / len(LETTERS)).abs() < 0.06).all()


@pytest.mark.parametrize(("height", "says"), [(2, "at least 3 pixels"), (90, "no room in a picture of 96×160 pixels")])
def test_letters_without_room_are_refused(height: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        _written(height)


def _planted(*, layer: int, height: int) -> tuple[FeatureMaps, torch.Tensor, list[int]]:
    """Return noise in three layers, of which one knows the letters of a height and above."""
    random = torch.Generator().manual_seed(0)
    heights = [8, 12, 16] * 20
    letters = torch.randint(len(LETTERS), (10, len(heights)), generator=random)
    maps = [torch.randn(10, len(heights), 24, generator=random) for _ in range(3)]
    tall = torch.tensor(heights) >= height
    known = torch.nn.functional.one_hot(letters, 24).float() * tall[None, :, None]
    maps[layer] = maps[layer] + 20 * known
    return FeatureMaps(tuple(maps), (0, 1, 2), ((1, len(heights)),) * 3), letters, heights


def test_a_planted_height_is_found_in_its_layer_alone() -> None:
    found = probe_letters(*_planted(layer=1, height=12))
    assert found.legible_from == (None, 12, None)
    assert list(found.scores) == [8, 12, 16]
    assert found.accuracy.shape == (3, 3)
    assert found.accuracy[1:, 1].min() > 0.9 and found.accuracy[:, [0, 2]].max() < 0.3
    assert "legible from 12 pixels up, in layer 1." in found.verdict


def test_letters_that_are_legible_nowhere_are_said_to_be_so() -> None:
    found = probe_letters(*_planted(layer=1, height=99))
    assert found.legible_from == (None, None, None)
    assert found.verdict == "No layer reads letters of 16 pixels or less."


def test_numbers_that_disagree_are_refused() -> None:
    features, letters, heights = _planted(layer=0, height=8)
    with pytest.raises(ValueError, match="give a letter for each token"):
        probe_letters(features, letters, heights[1:])
