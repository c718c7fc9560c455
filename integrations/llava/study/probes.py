"""Linear probes of the backbone's layers and the fusers' outputs, on the embedded scenes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from integrations.llava.config import ModelConfig
from integrations.llava.modeling import FusedLlavaForConditionalGeneration, blank_condition
from integrations.llava.synthetic import CHARACTERS, COLORS, GRID, SHAPES, Scene, draw_scene, scene_at
from layerfuse.analysis import fit_probe
from layerfuse.backbones import Backbone, create_backbone
from layerfuse.errors import InputError

from .results import Probe

__all__ = ["NOTHING", "CellLabels", "Models", "Readings", "all_layers_backbone", "cell_labels", "probe_text"]

NOTHING = -1
"""Label of a cell that shows none of the classes."""

Models = Mapping[str, FusedLlavaForConditionalGeneration]
"""Fuser -> trained model."""

_BATCH = 64
# Scenes whose cells are kept for the pictures.
_NUM_SHOWN = 16


@dataclass(frozen=True)
class Readings:
    """Which cells of the first test scenes linear probes name rightly.

    Attributes:
        scenes: B of them.
        right: "layer 3" or "output of mmfuser" -> (B, H, W): 1 where character or shape is named rightly, 0 where
            wrongly, `NOTHING` where a cell shows neither.
    """

    scenes: Sequence[Scene]
    right: Mapping[str, torch.Tensor]


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
        labelled = self.labels[self.labels != NOTHING]
        return labelled.bincount().max().item() / labelled.numel()

    @property
    def num_cells(self) -> int:
        """Number of labelled cells."""
        return int((self.labels != NOTHING).sum())


def cell_labels(scenes: Sequence[Scene]) -> list[CellLabels]:
    """Label every cell of scenes by its character, its shape and its colour; an object counts in all of its cells."""
    characters, shapes, colors = (torch.full((len(scenes), GRID, GRID), NOTHING) for _ in range(3))
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


def all_layers_backbone(config: ModelConfig, *, num_cells: int = 1) -> Backbone:
    """Build a recipe's backbone with every layer tapped, 0 = embeddings to the last block.

    Args:
        config: of the recipe's model, with one backbone.
        num_cells: a map gets so many cells along its shorter side at least, if the backbone takes larger pictures.
    """
    (own,) = config.backbones

    def build(size: int | tuple[int, int] | None) -> Backbone:
        return create_backbone(
            own.name,
            layers=lambda depth: range(depth + 1),
            pretrained=config.backbone_pretrained,
            image_size=size,
            options=own.options,
        ).eval()

    backbone = build(own.image_size)
    factor = -(-num_cells // min(backbone.grids()[0]))
    if factor == 1:
        return backbone
    height, width = backbone.image_size
    try:
        return build((height * factor, width * factor))
    except InputError:  # this backbone takes its own size only
        return backbone


def probe_text(
    backbone: Backbone,
    models: Models,
    *,
    seed: int,
    num_train: int,
    num_test: int,
) -> tuple[list[Probe], Readings]:
    """Measure what every layer and every trained fuser's output still shows of a cell.

    Args:
        backbone: taps all layers.
        models: fuser -> trained model with the same backbone.
        seed: of the data set, whose training and test scenes are used.
        num_train: images to fit on.
        num_test: images to score on.

    Returns:
        A probe for characters, one for shapes, one for colours; and what the first two read in the first test scenes.
    """
    fit, held = (
        _Tokens.of(backbone, models, [scene_at(seed, split, index) for index in range(count)])
        for split, count in (("train", num_train), ("test", num_test))
    )
    probes: list[Probe] = []
    right = {name: torch.full_like(held.labels[0].labels, NOTHING) for name in held.maps}
    for train, test in zip(fit.labels, held.labels, strict=True):
        shown = test.labels != NOTHING
        accuracies = {}
        for name, tokens in held.maps.items():
            chosen = train.labels != NOTHING
            probe = fit_probe(fit.maps[name][chosen], train.labels[chosen], num_classes=len(train.classes))
            named = probe.predict(tokens[shown]) == test.labels[shown]
            accuracies[name] = named.double().mean().item()
            if train.classes != COLORS:
                right[name][shown] = named.long()
        layers = {layer: accuracies[_layer(layer)] for layer in backbone.layers}
        fusers = {fuser: accuracies[_output(fuser)] for fuser in models}
        probes.append(Probe(train.title, test.num_cells, test.chance, layers, fusers))
    grids = {name: cells[:_NUM_SHOWN].unflatten(1, (GRID, GRID)) for name, cells in right.items()}
    return probes, Readings(held.scenes[:_NUM_SHOWN], grids)


@dataclass(frozen=True)
class _Tokens:
    """Scenes, the labels of their cells, and their tokens (B, N, C) in each layer and each fuser's output."""

    scenes: Sequence[Scene]
    labels: Sequence[CellLabels]
    maps: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, backbone: Backbone, models: Models, scenes: list[Scene]) -> _Tokens:
        images = backbone.preprocessing.batch([draw_scene(scene) for scene in scenes])
        maps = {
            _layer(layer): tokens for layer, tokens in zip(backbone.layers, _features(backbone, images), strict=True)
        }
        maps |= {_output(name): _fused(model, images) for name, model in models.items()}
        return cls(scenes, cell_labels(scenes), maps)


def _layer(layer: int) -> str:
    return f"layer {layer}"


def _output(fuser: str) -> str:
    return f"output of {fuser}"


@torch.inference_mode()
def _features(backbone: Backbone, images: torch.Tensor) -> list[torch.Tensor]:
    batches = [backbone(batch).maps for batch in images.split(_BATCH)]
    return [torch.cat(layer) for layer in zip(*batches, strict=True)]


@torch.inference_mode()
def _fused(model: FusedLlavaForConditionalGeneration, images: torch.Tensor) -> torch.Tensor:
    tower, fuser = model.model.vision_tower, model.model.fuser
    return torch.cat([fuser(tower(batch), blank_condition(fuser, len(batch), batch)) for batch in images.split(_BATCH)])
