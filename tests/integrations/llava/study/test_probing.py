from __future__ import annotations

import pytest
import torch

from integrations.llava.config.schema import ModelConfig
from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.study.probes import NOTHING, all_layers_backbone, cell_labels, probe_text
from integrations.llava.synthetic.dataset import scene_at
from integrations.llava.synthetic.scene import CHARACTERS, COLORS, GRID, SHAPES


def test_labels_name_what_each_cell_shows() -> None:
    scenes = [scene_at(0, "train", index) for index in range(5)]
    characters, shapes, colors = (own.labels.reshape(5, GRID, GRID) for own in cell_labels(scenes))
    for index, scene in enumerate(scenes):
        row, column = scene.text.row, scene.text.column
        shown = characters[index, row, column : column + len(scene.text.string)]
        assert [CHARACTERS[label] for label in shown] == list(scene.text.string)
        for item in scene.objects:
            last = (item.row + item.cells - 1, item.column + item.cells - 1)
            for place in ((item.row, item.column), last):
                assert SHAPES[int(shapes[index][place])] == item.shape
                assert COLORS[int(colors[index][place])] == item.color
        assert (characters[index] >= 0).sum() == len(scene.text.string)
        assert (shapes[index] >= 0).sum() == sum(item.cells**2 for item in scene.objects)
    assert torch.equal(shapes >= 0, colors >= 0)
    assert not ((shapes >= 0) & (characters >= 0)).any()


def test_chance_is_the_share_of_the_commonest_class() -> None:
    own = cell_labels([scene_at(0, "train", index) for index in range(3)])[0]
    labels = own.labels[own.labels >= 0]
    assert own.num_cells == 9
    assert own.chance == max((labels == label).double().mean().item() for label in labels.unique())


def test_probe_covers_every_layer_from_the_embeddings_on(tiny_recipe: object) -> None:
    config: ModelConfig = load_recipe(str(tiny_recipe)).model
    backbone = all_layers_backbone(config)
    probes, readings = probe_text(backbone, {}, seed=0, num_train=12, num_test=6)
    assert [probe.title.split()[0] for probe in probes] == ["Character", "Shape", "Colour"]
    for probe in probes:
        assert list(probe.layers) == [0, 1, 2, 3]
        assert all(0 <= accuracy <= 1 for accuracy in probe.layers.values())
        assert probe.fusers == {}
    assert probes[0].num_cells == 18
    assert list(readings.right) == [f"layer {layer}" for layer in range(4)]
    assert readings.scenes == [scene_at(0, "test", index) for index in range(6)]
    characters, shapes, _ = cell_labels(readings.scenes)
    for layer, right in zip(range(4), readings.right.values(), strict=True):
        assert torch.equal(right.flatten(1) != NOTHING, (characters.labels != NOTHING) | (shapes.labels != NOTHING))
        for probe, own in zip(probes, (characters, shapes), strict=False):
            read = right.flatten(1)[own.labels != NOTHING]
            assert read.double().mean().item() == pytest.approx(probe.layers[layer])


def test_maps_are_enlarged_to_the_cells_asked_for(tiny_recipe: object) -> None:
    config = load_recipe(str(tiny_recipe)).model
    own, enlarged = (all_layers_backbone(config, num_cells=number) for number in (1, 24))
    (first, *_), (second, *_) = own.grids(), enlarged.grids()
    assert first[0] < 24 <= second[0] < 24 + first[0]
    assert own.layers == enlarged.layers
