"""Draw a scene: photograph, plate and characters, objects, a little sensor noise.

Masks are small boolean arrays pasted pixel by pixel, without anti-aliasing and without a font file:
the same seed gives the same picture whatever versions of Pillow and FreeType are installed.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from .photographs import read_crop
from .scene import CELL, IMAGE_SIZE, TEXT_LENGTH, Scene, SceneObject, SceneText

__all__ = ["RGB", "draw_scene", "glyph_mask", "render_array", "shape_mask"]

RGB = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (175, 60, 200),
    "cyan": (60, 215, 225),
}

# 5×7 pixels a character: seven rows, each a number whose five low bits are the pixels from left to right.
_GLYPHS = {
    "A": "0E 11 11 1F 11 11 11",
    "C": "0E 11 10 10 10 11 0E",
    "E": "1F 10 10 1E 10 10 1F",
    "F": "1F 10 10 1E 10 10 10",
    "H": "11 11 11 1F 11 11 11",
    "K": "11 12 14 18 14 12 11",
    "L": "10 10 10 10 10 10 1F",
    "N": "11 11 19 15 13 11 11",
    "P": "1E 11 11 1E 10 10 10",
    "R": "1E 11 11 1E 14 12 11",
    "T": "1F 04 04 04 04 04 04",
    "U": "11 11 11 11 11 11 0E",
    "V": "11 11 11 11 11 0A 04",
    "X": "11 11 0A 04 0A 11 11",
    "Y": "11 11 0A 04 04 04 04",
    "2": "0E 11 01 02 04 08 1F",
    "3": "1F 02 04 02 01 11 0E",
    "4": "02 06 0A 12 1F 02 02",
    "7": "1F 01 02 04 08 08 08",
    "9": "0E 11 11 0F 01 02 0C",
}

# Photographs are drawn towards mid-grey, so that no background outshines the objects.
_PHOTOGRAPH_CONTRAST = 0.6
_NOISE = 5.0
_COLOR_JITTER = 18


@cache
def glyph_mask(character: str) -> np.ndarray:
    """Return a character's pixels, (7, 5) bool."""
    rows = [int(row, 16) for row in _GLYPHS[character].split()]
    return np.array([[bool(row >> (4 - bit) & 1) for bit in range(5)] for row in rows])


@cache
def shape_mask(shape: str, extent: int) -> np.ndarray:
    """Return a shape's pixels, (extent, extent) bool; every shape touches all four sides."""
    centre = (extent - 1) / 2
    y, x = np.mgrid[:extent, :extent] - centre
    radius = extent / 2
    if shape == "square":
        return np.ones((extent, extent), dtype=bool)
    if shape == "circle":
        return x**2 + y**2 <= radius**2
    if shape == "ring":
        return (x**2 + y**2 <= radius**2) & (x**2 + y**2 >= (radius * 0.55) ** 2)
    if shape == "cross":
        return (np.abs(x) <= extent / 6) | (np.abs(y) <= extent / 6)
    assert shape == "triangle"
    # One pixel (or two) at the tip, the whole width at the base.
    return np.abs(x) <= 0.5 + (y + centre) * (centre - 0.5) / (extent - 1) + 1e-6


def render_array(scene: Scene) -> np.ndarray:
    """Draw a scene as (64, 64, 3) uint8."""
    rng = np.random.default_rng(scene.noise_seed)
    photograph = read_crop(scene.crop, IMAGE_SIZE).astype(np.float32)
    canvas = 128 + _PHOTOGRAPH_CONTRAST * (photograph - 128)
    _draw_text(canvas, scene.text, rng)
    for item in scene.objects:
        _draw_object(canvas, item, rng)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * _NOISE
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def draw_scene(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of 64×64 pixels."""
    return Image.fromarray(render_array(scene))


def _draw_text(canvas: np.ndarray, text: SceneText, rng: np.random.Generator) -> None:
    """Paint the plate over the string's cells, then its glyphs."""
    plate, ink = 215 + 30 * rng.random(), 15 + 40 * rng.random()
    top, left = text.row * CELL, text.column * CELL
    canvas[top : top + CELL, left : left + TEXT_LENGTH * CELL] = plate
    # Unshifted, single pixels give characters away, and a linear probe reads them from every layer alike.
    right, down = rng.integers(1, 3), rng.integers(2)
    for index, character in enumerate(text.string):
        mask = glyph_mask(character)
        y, x = top + down, left + index * CELL + right
        canvas[y : y + mask.shape[0], x : x + mask.shape[1]][mask] = ink


def _draw_object(canvas: np.ndarray, item: SceneObject, rng: np.random.Generator) -> None:
    """Paint one object in a shade of its colour, on a light plate over its cells."""
    side = item.cells * CELL
    canvas[item.row * CELL : item.row * CELL + side, item.column * CELL : item.column * CELL + side] = (
        215 + 30 * rng.random()
    )
    shade = np.asarray(RGB[item.color], dtype=np.float32)
    shade = shade + rng.uniform(-_COLOR_JITTER, _COLOR_JITTER, size=3).astype(np.float32)
    window = canvas[item.top : item.top + item.extent, item.left : item.left + item.extent]
    window[shape_mask(item.shape, item.extent)] = shade
