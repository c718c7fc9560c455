"""Pictures for the report: the first test images, and those of users."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from integrations.llava.data import read_image

from ..results import Example, FuserRun

__all__ = ["draw_examples", "thumbnail"]


def thumbnail(image: Image.Image, *, size: int = 384) -> bytes:
    """Encode an image as PNG, not larger than a size in pixels; small ones stay as they are."""
    small = image.copy()
    small.thumbnail((size, size))
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def draw_examples(runs: Sequence[FuserRun], image_folder: Path, *, count: int) -> list[Example]:
    """Make examples of the first test images, in the order of the question file: none is picked; a run per fuser."""
    examples = []
    for name in list(dict.fromkeys(answer.question.images[0] for answer in runs[0].answers))[:count]:
        answers = {run.fuser: [each for each in run.answers if each.question.images == (name,)] for run in runs}
        examples.append(Example(name, thumbnail(read_image(image_folder / name)), answers))
    return examples
