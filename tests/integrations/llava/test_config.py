"""Recipe files: typed, complete, strict about keys; overrides win. `test_recipes` looks at those of the folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from integrations.llava.config import PARTS, Recipe, StageConfig
from integrations.llava.recipe_files import dump_recipe, load_recipe, parse_overrides


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
        ({"finetune.batch_size": 0}, "batch_size=0 is too small; give at least 1"),
        ({"finetune.learning_rates": {"fusr": 1e-4}}, "part 'fusr' is unknown; did you mean 'fuser'"),
        ({"finetune.lora.quantize": "nf5"}, "one of: none, int8, nf4"),
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


@pytest.mark.parametrize(
    ("values", "num_processes", "expected"),
    [
        ({"batch_size": 128, "micro_batch_size": 16}, 8, (16, 1)),
        ({"batch_size": 128, "micro_batch_size": 16}, 1, (16, 8)),
        ({"batch_size": 128}, 4, (32, 1)),
    ],
)
def test_a_batch_is_divided_among_processes_and_micro_batches(
    values: dict[str, int], num_processes: int, expected: tuple[int, int]
) -> None:
    assert StageConfig(trainable=(), template="v1", **values).batches(num_processes) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("num_processes", [3, 16])
def test_a_batch_that_cannot_be_divided_is_refused(num_processes: int) -> None:
    stage = StageConfig(trainable=(), template="v1", batch_size=128, micro_batch_size=16)

    with pytest.raises(ValueError, match=f"batch_size=128 cannot be divided among {num_processes} processes"):
        stage.batches(num_processes)


def test_every_part_can_be_trained() -> None:
    assert StageConfig(trainable=tuple(PARTS), template="v1").trainable == tuple(PARTS)


def test_the_resolved_recipe_spells_every_value_out() -> None:
    written = yaml.safe_load(dump_recipe(load_recipe("llava15_7b")))

    assert written["finetune"]["seed"] == 42
    assert "base" not in written
