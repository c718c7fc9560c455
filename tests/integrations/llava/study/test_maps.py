"""The pictures of the report's maps: their cells, colours and numbers."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.modeling import FusedLlavaForConditionalGeneration
from integrations.llava.modeling.build import build_recipe_model, read_language_files
from integrations.llava.study.probes import NOTHING, Readings, all_layers_backbone
from integrations.llava.study.report import draw_layers, draw_points, draw_readings, draw_shares
from integrations.llava.synthetic import CELL, GRID, scene_at
from layerfuse.fusers import DepthAttention

SCENES = [scene_at(0, "test", index) for index in range(5)]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def models(tiny_recipe: Path) -> dict[str, FusedLlavaForConditionalGeneration]:
    """New models by fuser, which tap layers 1, 2 and 3."""
    made = {}
    for fuser in ("select", "depth_attention", "mmfuser"):
        options = {"model.fuser_options": {"num_heads": 2}} if fuser == "depth_attention" else {}
        layers = {"model.layers": [3]} if fuser == "select" else {}
        config = load_recipe(str(tiny_recipe), {"model.fuser": fuser, **options, **layers}).model
        made[fuser] = build_recipe_model(config, read_language_files(config), seed=0).eval()
    return made


def test_layers_and_outputs_are_drawn_on_enlarged_cells_and_over_the_scene(
    tiny_recipe: Path, models: dict[str, FusedLlavaForConditionalGeneration]
) -> None:
    enlarged = all_layers_backbone(load_recipe(str(tiny_recipe)).model, num_cells=24)
    rows, columns = enlarged.grids()[0]
    figures = list(draw_layers(models, enlarged, SCENES[:2]))
    assert [figure.note for figure in figures] == [
        f"Test image {number}, enlarged to {rows}×{columns} cells." for number in (0, 1)
    ]
    scene, *maps = figures[0].panels
    assert scene.under is None
    assert [panel.title for panel in maps] == [
        *(f"layer {layer}" for layer in range(4)),
        *(f"output of {fuser}" for fuser in models),
    ]
    for panel in maps:
        assert pixels(panel.picture).shape == (rows, columns, 3)
        assert panel.under is not None
    by_title = {panel.title: panel.picture for panel in maps}
    # `select` gives layer 3 on, and a new `mmfuser` is the identity on its query.
    assert by_title["output of select"] == by_title["output of mmfuser"] == by_title["layer 3"]
    assert by_title["layer 0"] != by_title["layer 3"]
    assert figures[1].panels[1].picture != by_title["layer 0"]


def test_readings_are_blue_where_right_and_orange_where_wrong() -> None:
    right = torch.full((5, GRID, GRID), NOTHING)
    right[0, 0, :3] = torch.tensor([1, 1, 0])
    right[3, 7, 7] = 1
    right[4] = 0  # the fifth scene is left out: four make a square
    figure = draw_readings(Readings(SCENES, {"layer 3": right}))
    assert figure.note == "4 test images side by side, 16×16 cells."
    scenes, panel = figure.panels
    assert panel.title == "layer 3: 75% right"
    drawn = pixels(panel.picture)
    assert drawn.shape == pixels(scenes.picture).shape == (2 * GRID * CELL, 2 * GRID * CELL, 3)
    red, blue = (drawn[..., channel].reshape(2 * GRID, CELL, 2 * GRID, CELL).mean(axis=(1, 3)) for channel in (0, 2))
    tinted = {
        (int(row), int(column)): bool(blue[row, column] > red[row, column])
        for row, column in zip(*np.nonzero(abs(blue - red) > 25), strict=True)
    }
    assert tinted == {(0, 0): True, (0, 1): True, (0, 2): False, (15, 15): True}


def test_shares_are_those_of_the_fuser(models: dict[str, FusedLlavaForConditionalGeneration]) -> None:
    (figure,) = draw_shares(models, SCENES)
    scenes, *layers = figure.panels
    assert pixels(scenes.picture).shape == (2 * GRID * CELL, 2 * GRID * CELL, 3)
    # A new one takes as much of each layer.
    assert [panel.title for panel in layers] == [
        f"layer {layer}: text 33%, objects 33%, elsewhere 33%" for layer in (1, 2, 3)
    ]
    assert all(pixels(panel.picture).shape == (2 * GRID, 2 * GRID, 3) for panel in layers)
    fuser = models["depth_attention"].model.fuser
    assert isinstance(fuser, DepthAttention)
    with torch.no_grad():
        fuser.key_bias[1] = 50
    (figure,) = draw_shares(models, SCENES)
    assert [panel.title.partition(": ")[2] for panel in figure.panels[1:]] == [
        f"text {share}, objects {share}, elsewhere {share}" for share in ("0%", "100%", "0%")
    ]
    dark, bright = (pixels(figure.panels[position].picture).sum() for position in (1, 2))
    assert dark < bright


def test_sampling_points_are_drawn_for_mmfuser_alone(models: dict[str, FusedLlavaForConditionalGeneration]) -> None:
    (figure,) = draw_points(models, SCENES[0])
    assert figure.kind == "points"
    assert figure.note.startswith("mmfuser: where 4 cells of the query read the other layers")
    assert len(figure.panels) == 1
    assert not list(draw_points({"select": models["select"]}, SCENES[0]))
