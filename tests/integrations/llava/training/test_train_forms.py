"""Training on the same samples in every form of data: the same losses, also after kill -9; mixes."""

from __future__ import annotations

import dataclasses
import logging
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.cli import train as train_command
from integrations.llava.config.schema import Recipe
from integrations.llava.config.yaml_io import dump_recipe, load_recipe, parse_overrides
from integrations.llava.training import train
from integrations.llava.training.signals import RunInterrupted
from tests.integrations.llava.data.forms_support import FORMS, samples_about
from tests.integrations.llava.training.process_pairs import Nursery
from tests.integrations.llava.training.test_resume import StopAt, rows

COUNT = 200


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name of a form -> where 200 samples lie; the images of those that name files, in `images`."""
    images = tmp_path_factory.mktemp("images")
    samples = samples_about(images, COUNT)
    places = {name: write(samples, images, tmp_path_factory.mktemp(name)) for name, write in FORMS.items()}
    return {**places, "images": images}


def recipe_on(recipe: Recipe, written: dict[str, Path], form: str, *, steps: int, save_every: int = 1) -> Recipe:
    inside = form not in ("json", "messages")
    data = dataclasses.replace(
        recipe.pretrain.data, path=str(written[form]), image_folder="" if inside else str(written["images"])
    )
    stage = dataclasses.replace(
        recipe.pretrain,
        data=data,
        batch_size=8,
        micro_batch_size=8,
        max_steps=steps,
        save_every=save_every,
        log_every=1,
    )
    return dataclasses.replace(recipe, pretrain=stage)


@pytest.fixture(scope="module")
def expected(
    tiny_recipe: Recipe, written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[str, int, float]]:
    """Losses of one epoch over the json file, left alone."""
    recipe = recipe_on(tiny_recipe, written, "json", steps=25, save_every=25)
    return rows(train(recipe, tmp_path_factory.mktemp("whole") / "run", stages=["pretrain"]))


@pytest.mark.parametrize("form", [form for form in FORMS if form != "json"])
def test_every_form_has_the_same_losses(
    tiny_recipe: Recipe, written: dict[str, Path], expected: list[tuple[str, int, float]], form: str, tmp_path: Path
) -> None:
    recipe = recipe_on(tiny_recipe, written, form, steps=25, save_every=25)

    assert rows(train(recipe, tmp_path / "run", stages=["pretrain"])) == expected


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[] if form == "tar" else [pytest.mark.slow]) for form in FORMS]
)
def test_every_form_goes_on_after_kill_9_with_the_same_losses(
    tiny_recipe: Recipe,
    written: dict[str, Path],
    expected: list[tuple[str, int, float]],
    nursery: Nursery,
    form: str,
    tmp_path: Path,
) -> None:
    """Killed twice, at moments that differ from run to run."""
    recipe = recipe_on(tiny_recipe, written, form, steps=25)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    command = ["train", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")]
    log, moment, killed = tmp_path / "run" / "metrics.jsonl", random.Random(), 0
    for _ in range(2):
        before = log.read_text().count("\n") if log.is_file() else 0
        with nursery.alone("distributed_worker:command", [*command, "--stages", "pretrain"]) as process:
            while process.runs() and (not log.is_file() or log.read_text().count("\n") < before + 2):
                time.sleep(0.005)
            time.sleep(moment.uniform(0, 0.15))
            process.send(signal.SIGKILL)
            killed += process.wait().code == -signal.SIGKILL
    assert killed == 2 and 0 < len(rows(tmp_path / "run")) < 25

    assert rows(train(load_recipe(tmp_path / "recipe.yaml"), tmp_path / "run", stages=["pretrain"])) == expected


def test_an_edit_of_images_inside_a_file_is_noticed(tiny_recipe: Recipe, tmp_path: Path) -> None:
    samples = samples_about(tmp_path, 8)
    recipe = recipe_on(tiny_recipe, {"tar": FORMS["tar"](samples, tmp_path, tmp_path)}, "tar", steps=3)
    with pytest.raises(RunInterrupted):
        train(recipe, tmp_path / "run", stages=["pretrain"], callbacks=[StopAt("pretrain", 2)])
    (tmp_path / "3.jpg").write_bytes((tmp_path / "1.jpg").read_bytes() + b"x")
    FORMS["tar"](samples, tmp_path, tmp_path)

    with pytest.raises(ValueError, match="began with other samples: there are 8 as before"):
        train(recipe, tmp_path / "run", stages=["pretrain"])


def test_several_data_of_one_stage_are_a_mix_and_their_numbers_are_said(
    tiny_recipe: Recipe, written: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any
) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe_on(tiny_recipe, written, "json", steps=2)))
    common = ["--recipe", str(tmp_path / "recipe.yaml"), "--stages", "pretrain"]
    mix = [f"{written['tar']}:0.1", f"{written['parquet']}:1.5", str(written["messages"])]
    with caplog.at_level(logging.INFO):
        assert train_command.main([*common, "--output", str(tmp_path / "run"), "--data", *mix]) == 0

    said = "520 samples: 20 of data.tar (0.1 × 200), 300 of data.parquet (1.5 × 200), 200 of data.jsonl"
    assert f"stage pretrain: {said}" in caplog.messages
    stage = load_recipe(tmp_path / "run" / "recipe.yaml").pretrain
    assert stage.data.path == tuple(mix)
    assert len(rows(tmp_path / "run")) == 2
    assert train_command.main([*common, "--data", *mix, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"pretrain: {' '.join(mix)}:" in said and "520 of 520 samples can be used" in said


def test_a_recipe_lists_a_mix(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: mmfuser_7b\npretrain: {data: {path: [./a.json:0.5, b.tar]}}\n")
    paths = (f"{tmp_path.resolve()}/a.json:0.5", "b.tar")
    given = parse_overrides(["--finetune.data.path", "a.json:0.5", "b.tar", "--pretrain.data.path", "a.json"])

    assert load_recipe(tmp_path / "a.yaml").pretrain.data.path == paths
    recipe = load_recipe("mmfuser_7b", given)
    assert (recipe.finetune.data.path, recipe.pretrain.data.path) == (("a.json:0.5", "b.tar"), "a.json")
    (tmp_path / "b.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "b.yaml") == recipe


def test_several_data_for_both_stages_are_one_each(tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny_recipe))

    arguments = ["--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run"), "--data", "a", "b", "c"]
    assert train_command.main(arguments) == 2
