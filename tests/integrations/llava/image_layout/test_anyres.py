"""AnyRes: numbers of tokens and tiles, and how tokens are put together, against transformers' LLaVA-NeXT."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import (
    LlavaNextModel,
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)

from integrations.llava.image_layout import AnyResLayout, ImageSize, default_pinpoints, layout_from_config
from integrations.llava.modeling.tiling import pack_tiles
from layerfuse.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, prepare_tiles
from layerfuse.preprocessing.pixels import image_size

NEXT = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
LAYOUT = AnyResLayout(9, (336, 336), (24, 24), default_pinpoints((336, 336)))
EDGES = st.integers(1, 3000)
SIZES = [(336, 336), (480, 640), (640, 480), (50, 3000), (3000, 50), (1, 2999), (10, 10), (672, 672), (1008, 336)]


def theirs(size: ImageSize, layout: AnyResLayout) -> int:
    """What their processor counts; it reads nothing of a tokenizer for that."""
    height, width = layout.tile_size
    processor: Any = object.__new__(LlavaNextProcessor)
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=list(map(list, layout.pinpoints)))
    processor.patch_size, processor.num_additional_image_tokens = height // layout.grid[0], 0
    return int(processor._get_number_of_features(*size, height, width))


def packed_by_theirs(tiles: torch.Tensor, size: ImageSize, layout: AnyResLayout, newline: torch.Tensor) -> torch.Tensor:
    edge = layout.tile_size[0]
    vision = SimpleNamespace(image_size=edge, patch_size=edge // layout.grid[0])
    stub = SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=list(map(list, layout.pinpoints)))
    )
    packed, lengths = LlavaNextModel.pack_image_features(
        stub,  # type: ignore[arg-type]
        [tiles],
        torch.tensor([size]),
        vision_feature_select_strategy="default",
        image_newline=newline,
    )
    assert lengths.tolist() == [len(packed[0])]
    result: torch.Tensor = packed[0]
    return result


def test_default_pinpoints_are_llava_nexts() -> None:
    assert list(map(list, LAYOUT.pinpoints)) == NEXT
    assert default_pinpoints((32, 64))[0] == (32, 128)


@given(EDGES, EDGES)
def test_tokens_and_tiles_are_as_many_as_theirs(height: int, width: int) -> None:
    size = (height, width)

    assert LAYOUT.num_tokens(size) == theirs(size, LAYOUT)
    assert LAYOUT.num_tiles(size) == image_size_to_num_patches(size, NEXT, 336)
    assert LAYOUT.shape(size) == get_anyres_image_grid_shape(size, NEXT, 336)


@given(EDGES, EDGES, st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=6))
def test_tokens_are_packed_as_theirs(height: int, width: int, shapes: list[tuple[int, int]]) -> None:
    """To the bit, whatever pinpoints there are; a pinpoint may be one tile."""
    layout = AnyResLayout(9, (8, 8), (4, 4), tuple((8 * rows, 8 * columns) for rows, columns in shapes))
    size, newline = (height, width), torch.full((3,), -1.0)
    tiles = torch.arange(layout.num_tiles(size) * 16 * 3.0).view(-1, 16, 3)
    packed = pack_tiles(tiles, layout, size, newline)

    assert torch.equal(packed, packed_by_theirs(tiles, size, layout, newline))
    assert len(packed) == layout.num_tokens(size) == theirs(size, layout)
    assert layout.num_tokens(size) <= layout.num_tokens(layout.largest_size)


def test_a_lone_tile_ends_with_a_newline_as_theirs() -> None:
    lone, newline = AnyResLayout(9, (8, 8), (4, 4), ()), torch.full((3,), -1.0)
    tile = torch.randn(1, 16, 3)
    packed = pack_tiles(tile, lone, (5, 7), newline)

    assert torch.equal(packed, packed_by_theirs(tile, (5, 7), LAYOUT, newline))
    assert torch.equal(packed, torch.cat([tile[0], newline[None]]))
    assert lone.num_tokens((5, 7)) == lone.num_tokens() == 17
    assert (lone.num_tiles((5, 7)), lone.largest_size) == (1, (8, 8))


def test_rows_of_tokens_are_rows_of_the_image() -> None:
    """A wide image on 2 x 1 tiles of 2 x 2 tokens: its border above and below is cut off."""
    layout = AnyResLayout(9, (8, 8), (2, 2), ((16, 8),))
    tiles = torch.arange(3 * 4.0).view(3, 4, 1)
    packed = pack_tiles(tiles, layout, (8, 8), torch.tensor([-1.0]))

    assert packed.flatten().tolist() == [0, 1, 2, 3, *(6, 7, -1), *(8, 9, -1)]


def test_cells_that_are_not_square_are_cut_by_the_images_own_shape() -> None:
    """Twice as many tokens along the width: the picture takes the same part of the canvas."""
    wide = AnyResLayout(9, (8, 8), (4, 8), ((16, 16),))
    for size in ((100, 50), (50, 100), (70, 70)):
        square = AnyResLayout(9, (8, 8), (8, 8), ((16, 16),))
        seen = pack_tiles(torch.zeros(5, 32, 1), wide, size, torch.ones(1)).flatten()
        same = pack_tiles(torch.zeros(5, 64, 1), square, size, torch.ones(1)).flatten()
        # Newlines are ones: rows of both; the square one has twice as many rows.
        assert 2 * int(seen.sum()) == int(same.sum())
        assert (len(seen) - 32) // int(seen.sum()) == (len(same) - 64) // int(same.sum())


def test_a_config_gives_the_same_layout_and_is_what_json_holds() -> None:
    described = LAYOUT.config

    assert described == {"name": "anyres", "tile_size": [336, 336], "grid": [24, 24], "pinpoints": NEXT}
    assert layout_from_config(json.loads(json.dumps(described)), image_token_id=9) == LAYOUT
    assert LAYOUT.largest_size == (672, 672)
    assert (LAYOUT.num_tokens((672, 672)), LAYOUT.num_tokens()) == (576 + 48 * 49, 576 + 24 * 25)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pinpoints": [[336, 500]]},
            r"pinpoint 336 x 500 \(height x width\) is no whole number of tiles of 336",
        ),
        ({"pinpoints": [[336]]}, r"pinpoints has \[336\]; give \(height, width\), each 1 or more"),
        ({"pinpoints": [336, 672]}, "pinpoints has 336; give"),
        ({"grid": [24, 0]}, r"grid has \[24, 0\]; give"),
        ({"tile_size": "ab"}, "tile_size has 'ab'; give"),
    ],
)
def test_what_describes_no_tiles_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_from_config(LAYOUT.config | change, image_token_id=9)


# Pictures


def tiles_of(image: Image.Image, layout: AnyResLayout, preprocessing: Preprocessing) -> torch.Tensor:
    canvas = layout.canvas(image_size(image, upright=preprocessing.upright))
    return prepare_tiles(image, preprocessing, canvas)


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(height + width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", [(40, 60), (32, 32), (5, 200), (200, 5), (33, 97), (64, 64)])
def test_tiles_are_those_of_their_image_processor(size: ImageSize) -> None:
    """Where preprocessing agrees: LLaVA-NeXT squashes the overview."""
    layout = AnyResLayout(9, (32, 32), (4, 4), default_pinpoints((32, 32)))
    processor = LlavaNextImageProcessorPil(
        size={"height": 32, "width": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=list(map(list, layout.pinpoints)),
    )
    image = picture(*size)
    prepared = tiles_of(image, layout, Preprocessing((32, 32), CLIP_MEAN, CLIP_STD, mode="squash"))
    expected = processor(image, return_tensors="pt")

    assert expected["image_sizes"].tolist() == [list(size)]
    torch.testing.assert_close(prepared, expected["pixel_values"][0], atol=1e-6, rtol=1e-6)


def test_a_canvas_that_is_no_whole_number_of_tiles_is_refused() -> None:
    for canvas in ((40, 32), (0, 32)):
        said = rf"canvas of {canvas[0]} x 32 pixels .* no whole number of tiles of 32 x 32; give"
        with pytest.raises(ValueError, match=said):
            prepare_tiles(picture(9, 9), Preprocessing((32, 32), CLIP_MEAN, CLIP_STD), canvas)


def test_the_mode_decides_on_the_overview_alone_and_exif_on_both() -> None:
    layout = AnyResLayout(9, (32, 32), (4, 4), default_pinpoints((32, 32)))
    exif = Image.Exif()
    exif[0x0112] = 6
    image = picture(20, 60)
    image.info["exif"] = exif.tobytes()
    options = {"size": (32, 32), "mean": CLIP_MEAN, "std": CLIP_STD, "crop_pct": 0.8}
    tiles = {}
    for mode, upright in itertools.product(("pad", "crop", "squash", "border"), (False, True)):
        preprocessing = Preprocessing(**options, mode=mode, upright=upright)  # type: ignore[arg-type]
        prepared = tiles_of(image, layout, preprocessing)
        assert torch.equal(prepared[0], preprocessing(image))
        tiles.setdefault(upright, prepared[1:])
        assert torch.equal(prepared[1:], tiles[upright])
    assert (len(tiles[False]), len(tiles[True])) == (2, 2)
    turned = image.transpose(Image.Transpose.ROTATE_270)
    del turned.info["exif"]
    assert torch.equal(tiles[True], tiles_of(turned, layout, Preprocessing(**options, mode="pad"))[1:])  # type: ignore[arg-type]
