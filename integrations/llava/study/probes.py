"""Linear probes of the backbone's layers and the fusers' outputs, on the embedded scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from integrations.llava.config import ModelConfig
from integrations.llava.modeling import FusedLlavaForConditionalGeneration, blank_condition
from integrations.llava.synthetic import CHARACTERS, COLORS, GRID, SHAPES, Scene, draw_scene, scene_at
from layerfuse.analysis import probe_layers
from layerfuse.backbones import Backbone, create_backbone
from layerfuse.features import FeatureMaps

from .results import Probe

__all__ = ["CellLabels", "all_layers_backbone", "cell_labels", "probe_text"]

_NOTHING = -1
_BATCH = 64


@dataclass(frozen=True)
class CellLabels:
    """Classes of the cells of images; -1 where a cell shows none of them.

    Attributes:
        title: what is read.
        classes: names of the classes.
        labels: (B, N) class numbers, row-major over the grid.
    """

    title: str
    classes: tuple[str, ...]
    labels: torch.Tensor

    @property
    def chance(self) -> float:
        """Share of the commonest class among the labelled cells."""
        labelled = self.labels[self.labels != _NOTHING]
        return labelled.bincount().max().item() / labelled.numel()

    @property
    def num_cells(self) -> int:
        """Number of labelled cells."""
        return int((self.labels != _NOTHING).sum())


def cell_labels(scenes: Sequence[Scene]) -> list[CellLabels]:
    """Label every cell of scenes by its character, its shape and its colour; an object counts in all of its cells."""
    characters, shapes, colors = (torch.full((len(scenes), GRID, GRID), _NOTHING) for _ in range(3))
    for index, scene in enumerate(scenes):
        for offset, character in enumerate(scene.text.string):
            characters[index, scene.text.row, scene.text.column + offset] = CHARACTERS.index(character)
        for item in scene.objects:
            place = (index, slice(item.row, item.row + item.cells), slice(item.column, item.column + item.cells))
            shapes[place] = SHAPES.index(item.shape)
            colors[place] = COLORS.index(item.color)
    return [
        CellLabels("Character in the cell", tuple(CHARACTERS), characters.flatten(1)),
        CellLabels("Shape in the cell", SHAPES, shapes.flatten(1)),
        CellLabels("Colour in the cell", COLORS, colors.flatten(1)),
    ]


def all_layers_backbone(config: ModelConfig) -> Backbone:
    """Build a recipe's backbone with every layer tapped, 0 = embeddings to the last block."""
    (own,) = config.backbones
    return create_backbone(
        own.name,
        layers=lambda depth: range(depth + 1),
        pretrained=config.backbone_pretrained,
        image_size=own.image_size,
        options=own.options,
    ).eval()


def probe_text(
    backbone: Backbone,
    models: Mapping[str, FusedLlavaForConditionalGeneration],
    *,
    seed: int,
    num_train: int,
    num_test: int,
) -> list[Probe]:
    """Measure what every layer and every trained fuser's output still shows of a cell.

    Args:
        backbone: taps all layers.
        models: fuser -> trained model with the same backbone.
        seed: of the data set, whose training and test scenes are used.
        num_train: images to fit on.
        num_test: images to score on.

    Returns:
        A probe for characters, one for shapes and one for colours.
    """
    labels, maps = [], []
    for split, count in (("train", num_train), ("test", num_test)):
        scenes = [scene_at(seed, split, index) for index in range(count)]
        images = backbone.preprocessing.batch([draw_scene(scene) for scene in scenes])
        labels.append(cell_labels(scenes))
        maps.append([_features(backbone, images), *(_fused(model, images) for model in models.values())])
    probes = []
    for train, test in zip(*labels, strict=True):
        layers, *outputs = (
            probe_layers(fit, train.labels, held, test.labels, num_classes=len(train.classes))
            for fit, held in zip(*maps, strict=True)
        )
        fusers = {name: output[0] for name, output in zip(models, outputs, strict=True)}
        probes.append(Probe(train.title, test.num_cells, test.chance, layers, fusers))
    return probes


@torch.inference_mode()
def _features(backbone: Backbone, images: torch.Tensor) -> FeatureMaps:
    batches = [backbone(batch) for batch in images.split(_BATCH)]
    return replace(batches[0], maps=tuple(map(torch.cat, zip(*batches, strict=True))), prefix=())


@torch.inference_mode()
def _fused(model: FusedLlavaForConditionalGeneration, images: torch.Tensor) -> FeatureMaps:
    """Fuser output as if it were a layer of its own."""
    tower, fuser = model.model.vision_tower, model.model.fuser
    batches = images.split(_BATCH)
    tokens = torch.cat([fuser(tower(batch), blank_condition(fuser, len(batch), batch)) for batch in batches])
    grid = fuser.out_grid(tower.backbone.grids())
    assert grid is not None  # as of all the demo's fusers
    return FeatureMaps(maps=(tokens,), layers=(0,), grids=(grid,))
