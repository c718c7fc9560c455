"""Recipes that leave the layers to the fuser's source: the numbers that they become, in the dry run and in a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.checkpoints import load_model
from integrations.llava.config import InjectionConfig, Recipe, load_recipe
from integrations.llava.config.yaml_io import dump_recipe, parse_overrides
from integrations.llava.dry_run import dry_run, render
from integrations.llava.modeling import assemble, numbered_layers
from integrations.llava.study.grid import DemoSettings, run_recipe
from integrations.llava.training import train
from integrations.llava.training.signals import RunInterrupted
from layerfuse.errors import InputError
from tests.integrations.llava.training.test_resume import StopAt


def tiny(recipe: Recipe, fuser: str, layers: tuple[int, ...] | None = None, **values: Any) -> Recipe:
    model = dataclasses.replace(recipe.model, fuser=fuser, layers=layers, fuser_options={}, **values)
    return dataclasses.replace(recipe, model=model)


@pytest.mark.parametrize("written", ["layers: null", "layers: ~", "layers:"])
def test_an_empty_key_leaves_the_layers_to_the_fuser(written: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"base: mmfuser_7b\nmodel:\n  fuser: dense_connector\n  {written}\n")
    recipe = load_recipe(file)
    assert recipe.model.layers is None
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe


def test_the_command_line_can_leave_the_layers_to_the_fuser_and_name_them() -> None:
    for words, layers in ((["null"], None), (["~"], None), (["3,8", "13"], (3, 8, 13)), (["[3, 8]"], (3, 8))):
        assert load_recipe("mmfuser_7b", parse_overrides(["--model.layers", *words])).model.layers == layers


@pytest.mark.parametrize(
    ("fuser", "options", "layers"),
    [
        ("select", {}, (23,)),
        ("mmfuser", {}, (3, 8, 13, 18, 23)),
        ("concat", {}, (23, 20, 17, 14, 6)),
        ("dense_connector", {}, tuple(range(24))),
        ("dense_connector", {"mode": "sci"}, (7, 15, 23)),
        ("dense_connector", {"mode": "sti"}, (7, 15, 23)),
        ("text_gated", {}, tuple(range(1, 25))),
    ],
    ids=str,
)
def test_the_numbers_are_those_of_the_fuser_s_source(
    fuser: str, options: dict[str, Any], layers: tuple[int, ...]
) -> None:
    values = {"model.fuser": fuser, "model.fuser_options": options, "model.layers": None}
    recipe = load_recipe("mmfuser_7b", values)
    assert numbered_layers(recipe.model) == dataclasses.replace(recipe.model, layers=layers)


def test_layers_that_are_named_stay_as_they_are_written() -> None:
    config = load_recipe("mmfuser_7b").model
    assert numbered_layers(config) is config


def test_the_dry_run_shows_the_numbers() -> None:
    values = {"model.fuser": "dense_connector", "model.fuser_options": {"mode": "sci"}, "model.layers": None}
    page = render(dry_run(load_recipe("mmfuser_7b", values)))
    assert "layers 7, 15, 23 of 24, 336 x 336 pixels" in page
    assert "dense_connector: 3 maps of 24 x 24 x 1,024" in page


def test_a_fuser_without_published_layers_is_named() -> None:
    for fuser, changes in (("average", {}), ("mmfuser", {"model.backbone": "vit_base_patch16_clip_224.openai"})):
        config = load_recipe("mmfuser_7b", {"model.fuser": fuser, "model.layers": None, **changes}).model
        with pytest.raises(
            InputError, match=rf"model.layers is empty, .* {fuser!r} has no published choice .* model.layers: \[3, 8"
        ):
            numbered_layers(config)


def test_layers_that_are_only_injected_come_behind_the_published_ones(tiny_recipe: Recipe) -> None:
    recipe = tiny(tiny_recipe, "select", injection=InjectionConfig(pairs=((2, 0), (4, 1))))
    assert numbered_layers(recipe.model).layers == (4,)
    model = assemble(recipe.model).model.model
    assert model.vision_tower.backbone.layers == (4, 2) and model.fuser.num_layers == 1


def test_a_run_writes_the_numbers_down_and_goes_on_with_them(tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = tiny(tiny_recipe, "dense_connector")
    with pytest.raises(RunInterrupted):
        train(recipe, tmp_path / "run", callbacks=[StopAt("pretrain", 1)])
    saved = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert saved == tiny(tiny_recipe, "dense_connector", (0, 1, 2, 3, 4))
    with pytest.raises(InputError, match=r"differs in model.layers \(\[0, 1, 2, 3, 4\] then, \[1, 4\] now\)"):
        train(tiny(tiny_recipe, "dense_connector", (1, 4)), tmp_path / "run")
    with pytest.raises(RunInterrupted):
        train(recipe, tmp_path / "run", callbacks=[StopAt("finetune", 1)])
    model = load_model(train(saved, tmp_path / "run")).model
    assert model.vision_tower.backbone.layers == (0, 1, 2, 3, 4)
    assert (model.fuser.name, model.fuser.num_layers) == ("dense_connector", 5)


def test_a_study_leaves_the_layers_of_every_fuser_to_its_source(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: tiny\nmodel:\n  fuser: dense_connector\n  layers: null\n")
    settings = DemoSettings(recipe=str(tmp_path / "mine.yaml"))
    for fuser, layers in (("select", (5,)), ("dense_connector", (0, 1, 2, 3, 4, 5))):
        recipe = run_recipe(settings, fuser, 0, tmp_path)
        assert recipe.model.layers is None and numbered_layers(recipe.model).layers == layers
