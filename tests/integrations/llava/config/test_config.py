"""Recipe files: typed, complete, strict about keys; overrides win. `test_recipes` looks at those of the folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from integrations.llava.config.schema import PARTS, ModelConfig, Recipe, StageConfig
from integrations.llava.config.yaml_io import dump_recipe, load_recipe, parse_overrides
from layerfuse.errors import UserError


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
        ({"modle.fuser": "x"}, "override 'modle.fuser': unknown key 'modle'; did you mean 'model'"),
        ({"pretrain.data.pth": "x"}, "did you mean 'pretrain.data.path'"),
        ({"finetune.batch_size": "many"}, "finetune.batch_size is 'many'; give a whole number"),
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


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write recipe files; the last one is returned."""

    def write(**files: str | bytes) -> Path:
        for name, content in files.items():
            path = tmp_path / f"{name}.yaml"
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# Variants and overrides


BASE = """
model:
  fuser_options: {num_heads: 8, num_points: 2}
  backbone_options: {dynamic_img_size: true}
  llm_architecture: {model_type: llama, hidden_size: 32}
pretrain:
  learning_rates: {fuser: 1e-4}
"""


@pytest.mark.parametrize(
    ("variant", "arguments"),
    [("model: {fuser: average}", ""), ("", "--model.fuser average"), ("", "--model.fuser=average")],
)
def test_another_fuser_does_not_inherit_the_options_of_the_one_below(
    variant: str, arguments: str, write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        recipe = load_recipe(write(base=BASE, mine=f"base: base.yaml\n{variant}"), parse_overrides(arguments.split()))

    assert (recipe.model.fuser, recipe.model.fuser_options) == ("average", {})
    assert "model.fuser_options {'num_heads': 8, 'num_points': 2} was written for fuser 'mmfuser'" in caplog.text
    assert recipe.model.backbone_options == {"dynamic_img_size": True}


def test_options_given_with_another_fuser_are_its_own_wherever_they_stand(write: Callable[..., Path]) -> None:
    arguments = "--model.fuser_options.temperature 2 --model.fuser scalar_mix"
    recipe = load_recipe(write(base=BASE), parse_overrides(arguments.split()))

    assert recipe.model.fuser_options == {"temperature": 2}


def test_the_same_fuser_named_again_keeps_its_options(write: Callable[..., Path]) -> None:
    recipe = load_recipe(write(base=BASE), {"model.fuser": "mmfuser", "model.fuser_options.num_points": 8})

    assert recipe.model.fuser_options == {"num_heads": 8, "num_points": 8}


@pytest.mark.parametrize(
    ("key", "value", "options"),
    [
        ("model.backbone", "vit_base_patch16_224", "backbone_options"),
        ("model.family", "open_clip", "backbone_options"),
        ("model.llm", "another/model", "llm_architecture"),
    ],
)
def test_what_was_written_for_one_model_is_not_taken_for_another(
    key: str, value: str, options: str, write: Callable[..., Path]
) -> None:
    file = write(base=BASE)

    assert getattr(load_recipe(file).model, options) != {}
    assert getattr(load_recipe(file, {key: value}).model, options) == {}


@pytest.mark.parametrize("nothing", ["{}", "null", ""])
def test_an_empty_dictionary_clears_the_one_below(nothing: str, write: Callable[..., Path]) -> None:
    variant = f"base: base.yaml\nmodel:\n  fuser_options: {nothing}\npretrain:\n  learning_rates: {nothing}\n"
    recipe = load_recipe(write(base=BASE, mine=variant))
    assert (recipe.model.fuser_options, recipe.pretrain.learning_rates) == ({}, {})

    cleared = parse_overrides(["--model.fuser_options", nothing, "--model.fuser_options.num_heads", "4"])
    assert load_recipe(write(base=BASE), cleared).model.fuser_options == {"num_heads": 4}


def test_an_empty_section_changes_nothing(write: Callable[..., Path]) -> None:
    assert load_recipe(write(base=BASE), {"finetune.data": {}}) == load_recipe(write(base=BASE))


def test_a_variant_has_a_name_of_its_own(write: Callable[..., Path]) -> None:
    assert load_recipe(write(base="name: first\n", mine="base: base.yaml\n")).name == "mine"


def test_a_recipe_of_the_package_is_a_base_by_its_name(write: Callable[..., Path]) -> None:
    recipe = load_recipe(write(mine="base: mmfuser_7b\nfinetune: {max_steps: 3}\n"))

    assert recipe.finetune.max_steps == 3
    assert recipe.model == load_recipe("mmfuser_7b").model


def test_an_empty_file_is_a_recipe_of_defaults_and_a_base_like_any_other(write: Callable[..., Path]) -> None:
    recipe = load_recipe(write(base="# nothing yet\n", mine="base: base.yaml\nmodel: {fuser: average}\n"))

    assert recipe.model == ModelConfig(fuser="average")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"mine": "base: mine.yaml"}, r"mine.yaml derives from itself \(mine.yaml -> mine.yaml\); remove one `base`"),
        ({"other": "base: mine.yaml", "mine": "base: other.yaml"}, r"mine.yaml -> other.yaml -> mine.yaml"),
        ({"mine": "base: [a.yaml]"}, r"base is \['a.yaml'\]; give the file or the name of a recipe"),
        ({"mine": "base: mmfuser7b"}, r"mmfuser7b, which does not exist; recipes of the package: average_7b, "),
        ({"base": "modle: {}", "mine": "base: base.yaml"}, r"base.yaml: unknown key 'modle'"),
        ({"base": "- 1", "mine": "base: base.yaml"}, r"base.yaml holds a list"),
    ],
)
def test_a_base_that_cannot_be_is_refused(files: dict[str, str], message: str, write: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(write(**files))


# YAML


@pytest.mark.parametrize(
    "word", ["no", "on", "Yes", "12:30", "1e-5", "2024-01-01", "010", "null", "~", "1_000", "0x1F", ""]
)
def test_text_on_the_command_line_is_taken_as_it_stands(word: str) -> None:
    for arguments in (["--model.llm", word], [f"--model.llm={word}"]):
        assert load_recipe("mmfuser_7b", parse_overrides(arguments)).model.llm == word


@pytest.mark.parametrize("word", ["no", "on", "12:30", "2024-01-01", "010"])
def test_words_that_yaml_1_1_takes_for_something_else_are_text_in_a_file(word: str, write: Callable[..., Path]) -> None:
    assert load_recipe(write(mine=f"model: {{llm: {word}}}")).model.llm == word


@pytest.mark.parametrize(
    ("word", "value"), [("no", False), ("Off", False), ("false", False), ("ON", True), ("yes", True)]
)
def test_words_for_yes_and_no_are_switches_where_one_is_expected(
    word: str, value: bool, write: Callable[..., Path]
) -> None:
    key = "finetune.gradient_checkpointing"
    assert load_recipe("mmfuser_7b", parse_overrides([f"--{key}", word])).finetune.gradient_checkpointing is value
    file = write(mine=f"finetune: {{gradient_checkpointing: {word}}}")
    assert load_recipe(file).finetune.gradient_checkpointing is value


@pytest.mark.parametrize("arguments", ["3 8 13", "3,8,13", "3, 8, 13", "[3, 8, 13]", "[3,8,13]"])
def test_several_values_may_stand_apart_or_between_commas(arguments: str) -> None:
    words = [arguments] if arguments.startswith("[") else arguments.split()
    overrides = parse_overrides(["--model.layers", *words, "--finetune.trainable", "fuser,projector"])
    recipe = load_recipe("mmfuser_7b", overrides | {"finetune.learning_rates": {}})

    assert recipe.model.layers == (3, 8, 13)
    assert recipe.finetune.trainable == ("fuser", "projector")


def test_one_value_stands_for_a_list_of_one() -> None:
    assert load_recipe("llava15_7b", parse_overrides(["--model.layers", "-2"])).model.layers == (-2,)


@pytest.mark.parametrize(
    "value",
    ["no", "1e-5", "12:30", "2024-01-01", "0o17", "010", "true", "null", "~", "", "<<", "1.5", " x ", "é", ".nan"],
)
def test_text_of_every_look_survives_writing_and_reading(value: str, tmp_path: Path) -> None:
    options = {"model.fuser_options": {"name": value, "other": [value, 1, 2.5, 1e-5, 1e20, True, None]}}
    recipe = load_recipe("mmfuser_7b", options | {"model.llm": value})
    (tmp_path / "mine.yaml").write_text(dump_recipe(recipe), encoding="utf-8")

    assert load_recipe(tmp_path / "mine.yaml", {"name": recipe.name}) == recipe
    assert yaml.safe_load(dump_recipe(recipe))["model"]["llm"] == value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_encoding_that_yaml_allows_is_read(encoding: str, write: Callable[..., Path]) -> None:
    assert load_recipe(write(mine="model: {llm: é}".encode(encoding))).model.llm == "é"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: {llm: \xe9}", "mine.yaml is no text in UTF-8 .*; save it as UTF-8"),
        ("model: {llm: a}".encode("utf-16-le"), "mine.yaml is no text in UTF-8"),
        ("model: {fuser: a}\nfinetune: {}\nmodel: {}", "mine.yaml, line 3, column 1: .*'model' stands twice; keep one"),
        ("model:\n  fuser: a\n  fuser: b", "mine.yaml, line 3, column 3: .*'fuser' stands twice"),
        ("model: {fuser: ]", "mine.yaml, line 1, column 16: no valid YAML: while parsing"),
        ("model:\n  fuser_options: &a {y: *a}", "mine.yaml, line 2, column 18: .* recursive"),
        ("model:\n\tfuser: a", "mine.yaml, line 2, column 1: no valid YAML"),
        ("model: !!python/name:os.system", "mine.yaml, line 1, column 8: no valid YAML: could not determine"),
        ("[" * 100_000, "mine.yaml is nested too deeply"),
        (
            "model: {fuser_options: {x: no}}",
            "x is no, which may be text or a truth value; write true, false",
        ),
        ("model: {fuser_options: {1: 2}}", "fuser_options has the key 1, which is no text; put it in quotes"),
        ("1: 2", "unknown key '1'"),
        ("model:", "'model' is a section with keys of its own; it cannot be None"),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(
    content: str | bytes, message: str, write: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(write(mine=content))


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "mine.yaml").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"mine.yaml cannot be read \(Permission denied\)"):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--finetune.batch_size"], "--finetune.batch_size has no value; write it behind"),
        (["--finetune.batch_size", "12:30"], "finetune.batch_size is '12:30'; give a whole number"),
        (["--finetune.batch_size", "010"], "finetune.batch_size is '010'; give a whole number"),
        (["--model.layers", "3;8"], "model.layers is '3;8'; give a whole number"),
        (["--model.llm", "a", "b"], r"model.llm is \['a', 'b'\]; give text"),
        (["--model.fuser_options.x", "{"], "--model.fuser_options.x {, line 1, column 2: no valid YAML"),
        (["--model", "3"], "'model' is a section"),
        (["--model.fuser.x", "3"], r"model.fuser is {'x': 3}; give text"),
    ],
)
def test_a_wrong_value_on_the_command_line_is_named_with_its_key(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe("mmfuser_7b", parse_overrides(arguments))


def test_an_old_recipe_with_an_image_cache_loads_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    recipe = load_recipe("mmfuser_7b", {"pretrain.data.cache_images": 512})

    assert recipe.pretrain.data.cache_images == 512
    assert "data.cache_images has no effect any more" in caplog.text


def test_paths_from_the_working_folder_mean_the_same_in_the_file_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, file = tmp_path / "work", tmp_path / "work" / "run" / "recipe.yaml"
    file.parent.mkdir(parents=True)
    monkeypatch.chdir(work)
    given = {"finetune.data.path": ["./a.json:0.5", "b.json"], "finetune.data.image_folder": "../images"}
    recipe = load_recipe("tiny", given)
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    read = load_recipe(file)

    assert read.finetune.data.path == (str(work.resolve() / "a.json:0.5"), "b.json")
    assert read.finetune.data.image_folder == str(tmp_path.resolve() / "images")
    assert dump_recipe(read) == dump_recipe(recipe)
