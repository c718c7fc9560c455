"""Pictures for the report: feature maps as in Figure 5 of the paper, and the first test images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image

from integrations.llava.data import read_image
from integrations.llava.modeling import FusedLlavaForConditionalGeneration, blank_condition
from layerfuse.analysis import colorize, fusion_maps, png_bytes, reduce_map

from ..results import Example, Figure, FuserRun

__all__ = ["draw_examples", "draw_feature_maps", "thumbnail"]

_MAP_SIZE = 128


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


@torch.inference_mode()
def draw_feature_maps(
    models: Mapping[str, FusedLlavaForConditionalGeneration], names: Sequence[str], image_folder: Path
) -> list[Figure]:
    """Draw the maps that go into the fusers and those that come out: a figure per image, with one colour scale.

    The key/value layers and the query are those of the model that taps most layers; its last map is the query.
    """
    widest = max(models.values(), key=lambda model: len(model.model.vision_tower.backbone.layers))
    figures = []
    for name in names:
        image = read_image(image_folder / name)
        pixels = widest.model.vision_tower.backbone.preprocessing.batch([image])
        features = widest.model.vision_tower(pixels)
        grid = features.grids[-1]
        inputs = fusion_maps(features, features.maps[-1])
        maps = {key: value[0] for key, value in inputs.items() if key != "output"}
        for fuser, model in models.items():
            blank = blank_condition(model.model.fuser, 1, pixels)
            output = model.model.fuser(model.model.vision_tower(pixels), blank)
            reduced = reduce_map(output, grid)[0]
            # The sign of a component means nothing: one that runs against the query's is turned round.
            maps[f"output of {fuser}"] = -reduced if (reduced * maps["query"]).sum() < 0 else reduced
        pictures = dict(zip(maps, map(png_bytes, colorize(maps, size=_MAP_SIZE)), strict=True))
        figures.append(Figure(name, thumbnail(image), pictures))
    return figures
