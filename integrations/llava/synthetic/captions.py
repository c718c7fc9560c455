"""Captions of scenes, cell by cell."""

from __future__ import annotations

from .scene import GRID, TEXT_LENGTH, Scene

__all__ = ["DENSE_CAPTION_PROMPT", "dense_caption", "scene_words"]

DENSE_CAPTION_PROMPT = "Write the image out."


def dense_caption(scene: Scene) -> str:
    """Write a scene out, cell by cell: the caption of the pretrain stage.

    One line of prose supervises a dozen tokens and leaves it open which visual token they are about. In hundreds of
    steps nothing could be learned from that; from this, where each visual token is asked for its word, it can.
    """
    return "".join(scene_words(scene))


def scene_words(scene: Scene) -> list[str]:
    """Write a scene out: one cell word for each of the 8×8 cells, row by row."""
    words = [f"[{scene.photograph}]"] * (GRID * GRID)
    for index, character in enumerate(scene.text.string):
        words[scene.text.row * GRID + scene.text.column + index] = f"[{character}]"
    assert len(scene.text.string) == TEXT_LENGTH
    for item in scene.objects:
        for row in range(item.row, item.row + item.cells):
            for column in range(item.column, item.column + item.cells):
                words[row * GRID + column] = f"[{item.color} {item.shape}]"
    return words
