"""Recipes: typed, complete, strict about keys; every recipe of the folder is built and stepped."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from integrations.llava.config import PARTS, Recipe, StageConfig
from integrations.llava.recipe_files import RECIPE_FOLDER, dump_recipe, load_recipe, parse_overrides, recipe_names
from integrations.llava.train import train
from tests.integrations.llava.tiny_parts import tiny_overrides


def test_the_folder_holds_the_recipes_we_know_of() -> None:
    assert recipe_names() == ("llava15_7b", "mmfuser_7b", "tiny")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_opens_with_command_hardware_source_and_scores(name: str) -> None:
    text = (RECIPE_FOLDER / f"{name}.yaml").read_text()
    header = text[: text.index("\n\n", text.index("Expected"))] if "\n\n" in text else text

    assert all(word in header for word in ("python -m integrations.llava", "Hardware:", "Source", "Expected"))


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_trains_both_stages_with_sizes_made_tiny(
    name: str, backbone_folder: Path, llm_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    overrides = tiny_overrides(backbone_folder, llm_folder, data_folder)
    recipe = load_recipe(name, {f"{stage}.max_steps": 1 for stage in ("pretrain", "finetune")} | overrides)
    num_layers = len(recipe.model.layers)
    options = {"num_heads": 4} if recipe.model.fuser == "mmfuser" else {}
    small = overrides | {
        "model.layers": list(range(1, num_layers + 1)),
        "model.fuser_options": options,
        "pretrain.max_steps": 1,
        "finetune.max_steps": 1,
    }

    folder = train(load_recipe(name, small), tmp_path / name)

    assert (folder / "model.safetensors").is_file()


def test_published_numbers_of_mmfuser_7b() -> None:
    recipe = load_recipe("mmfuser_7b")

    assert recipe.model.layers == (-22, -17, -12, -7, -2)
    assert recipe.pretrain.learning_rate == 1e-3
    assert recipe.finetune.learning_rate == 2e-5
    assert (recipe.pretrain.batch_size, recipe.finetune.batch_size) == (256, 128)
    assert (recipe.pretrain.template, recipe.finetune.template) == ("plain", "v1")
    assert (recipe.pretrain.data.image_mode, recipe.finetune.data.image_mode) == ("crop", "pad")
    assert recipe.finetune.group_by_modality and not recipe.pretrain.group_by_modality


def test_a_variant_shows_only_what_differs_from_its_base() -> None:
    baseline, mmfuser = load_recipe("llava15_7b"), load_recipe("mmfuser_7b")

    assert baseline.model.fuser == "select" and baseline.model.layers == (-2,)
    assert baseline.pretrain == mmfuser.pretrain and baseline.finetune == mmfuser.finetune


def test_stages_train_fuser_and_projector_then_also_the_llm() -> None:
    recipe = load_recipe("mmfuser_7b")

    assert recipe.pretrain.trainable == ("fuser", "projector")
    assert recipe.finetune.trainable == ("fuser", "projector", "llm")


def test_a_dumped_recipe_loads_as_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("mmfuser_7b", {"model.fuser_options": {"num_heads": 8}, "finetune.max_steps": 7})
    file = tmp_path / "mine.yaml"
    file.write_text(dump_recipe(recipe))

    assert load_recipe(file) == recipe


def test_command_line_values_are_typed() -> None:
    arguments = (
        "--finetune.learning_rate 2e-5 --model.layers -22 -2 --model.fuser=average --pretrain.data.image-folder a"
    )
    overrides = parse_overrides([*arguments.split(), "--finetune.gradient_checkpointing"])
    recipe = load_recipe("mmfuser_7b", overrides)

    assert recipe.finetune.learning_rate == 2e-5
    assert recipe.model.layers == (-22, -2)
    assert recipe.model.fuser == "average"
    assert recipe.pretrain.data.image_folder == "a"
    assert recipe.finetune.gradient_checkpointing is True


def test_scientific_notation_in_yaml_is_a_number(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model:\n  fuser_options: {scale: 2e-5, name: 1e}\n")

    assert load_recipe(file).model.fuser_options == {"scale": 2e-5, "name": "1e"}


def test_relative_paths_are_meant_from_the_recipe_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model:\n  llm: ./llm\n  backbone: plain_name\n")
    model = load_recipe(file).model

    assert model.llm == str(tmp_path / "llm")
    assert model.backbone == "plain_name"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"finetune.learning_rat": 1}, "unknown key 'finetune.learning_rat'; did you mean 'finetune.learning_rate'"),
        ({"modle.fuser": "x"}, "unknown key 'modle'; did you mean 'model'"),
        ({"pretrain.data.pth": "x"}, "did you mean 'pretrain.data.path'"),
        ({"finetune.batch_size": "many"}, "`finetune.batch_size`: Couldn't parse 'many' into an int"),
        ({"finetune.data.image_mode": "stretch"}, "one of: pad, crop, squash"),
        ({"finetune.trainable": ["fusr"]}, "part 'fusr' is unknown; did you mean 'fuser'"),
        ({"model": 3}, "'model' is a section"),
    ],
)
def test_a_wrong_key_or_value_is_an_error_that_helps(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        load_recipe("mmfuser_7b", overrides)
    assert message in str(error.value)


def test_an_unknown_recipe_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'mmfuser_7b'.* A file of your own ends in .yaml"):
        load_recipe("mmfuser7b")


def test_a_missing_recipe_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.yaml does not exist"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: nowhere.yaml\n")

    with pytest.raises(FileNotFoundError, match="derives from .*nowhere.yaml, which does not exist"):
        load_recipe(file)


def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("- 1\n")

    with pytest.raises(ValueError, match="holds a list; a recipe is a mapping"):
        load_recipe(file)


def test_a_stray_command_line_word_is_refused() -> None:
    with pytest.raises(ValueError, match="'stray' is not a key"):
        parse_overrides(["stray"])


def test_an_unknown_stage_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'finetune'"):
        Recipe().stage("finetun")


def test_every_part_can_be_trained() -> None:
    assert StageConfig(trainable=tuple(PARTS), template="v1").trainable == tuple(PARTS)


def test_the_resolved_recipe_spells_every_value_out() -> None:
    written = yaml.safe_load(dump_recipe(load_recipe("llava15_7b")))

    assert written["finetune"]["seed"] == 42
    assert "base" not in written


def test_the_tiny_recipe_names_folders_of_the_package() -> None:
    recipe = load_recipe("tiny")
    for folder in (recipe.model.backbone, recipe.model.llm):
        assert Path(folder).is_dir()
    assert AutoTokenizer.from_pretrained(recipe.model.llm).eos_token is not None
