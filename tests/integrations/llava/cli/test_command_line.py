"""`python -m integrations.llava`: quick help, one command per job, errors in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from integrations.llava import __main__ as command_line
from integrations.llava.cli.train import main as train_main
from integrations.llava.config import parse_overrides
from tests.integrations.llava.tiny_parts import tiny_overrides


def test_every_command_leads_to_a_main_function() -> None:
    import importlib

    for module, _ in command_line._COMMANDS.values():
        assert callable(importlib.import_module(module).main)


def test_an_unknown_command_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["trian"])
    assert "train" in capsys.readouterr().err


def test_a_missing_package_is_named_with_the_way_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(command_line._COMMANDS, "train", ("package_that_is_not_there", ""))
    with pytest.raises(SystemExit, match="2"):
        command_line.main(["train"])
    assert "train needs the package 'package_that_is_not_there'; install it with" in capsys.readouterr().err


def test_train_runs_a_recipe_with_overrides(
    backbone_folder: Path, llm_folder: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--recipe", "llava15_7b", "--output", str(tmp_path / "run"), "--stages", "pretrain"]
    for key, value in tiny_overrides(backbone_folder, llm_folder, data_folder).items():
        arguments += [f"--{key}", str(value)]

    assert command_line.main(arguments) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert f"run: {tmp_path / 'run'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "mmfuser7b"], "did you mean 'mmfuser_7b'"),
        (["--recipe", "mmfuser_7b", "--finetune.learning_rat", "1"], "did you mean 'finetune.learning_rate'"),
        (["--recipe", "mmfuser_7b", "stray"], "'stray' is not a key"),
        (["--recipe", "mmfuser_7b"], "stage pretrain: no data"),
        (["--recipe", "mmfuser_7b", "--dryrun"], "--dryrun is no option; did you mean --dry-run?"),
        (["--recipe", "mmfuser_7b", "--max_samples=3"], "--max_samples is no option; did you mean --max-samples?"),
        (["--recipe", "mmfuser_7b", "--max-samples", "0"], "max_samples=0 is too small"),
        (
            ["--recipe", "mmfuser_7b", "--image-folder", ".", "data.bad_samples=skip"],
            "--image-folder names 'data.bad_samples=skip', which is no path; a setting has two dashes in front: "
            "--finetune.data.bad_samples skip",
        ),
    ],
)
def test_train_explains_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main(["--output", str(tmp_path / "run"), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("layers", ["3,8,13", "-22,-17,-2", "3, 8"])
def test_layers_on_the_command_line_may_have_commas(layers: str, tmp_path: Path) -> None:
    overrides = parse_overrides(["--model.layers", layers])
    assert overrides == {"model.layers": [int(layer) for layer in layers.split(",")]}


def test_the_name_of_a_gpu_may_be_written_in_capitals(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_main(["--recipe", "mmfuser_7b", "--dry-run", "--gpu", "A100-80"]) == 0
    assert "Dry run of mmfuser_7b on a100-80" in capsys.readouterr().out


WRONG = {"data": ["check"], "demo": ["--fusers"], "train": ["--stages"], "runs": ["--nonsense"]}


@pytest.mark.parametrize("name", command_line._COMMANDS)
def test_wrong_usage_is_told_in_two_lines_without_a_list_of_all_options(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command_line.main([name, *WRONG.get(name, [])])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and " error: " in said[0] and said[1].endswith("--help lists all options")


def test_the_package_offers_its_public_names() -> None:
    import integrations.llava as package

    assert all(hasattr(package, name) for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_evaluate_hands_on_how_images_are_prepared_and_decoding_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from integrations.llava.cli import evaluate

    def note(*_: object, **given: object) -> None:
        seen.append((given["num_workers"], given["compile"]))

    seen: list[tuple[object, object]] = []
    monkeypatch.setattr(evaluate, "evaluate", note)
    monkeypatch.setattr(evaluate, "evaluate_tasks", note)
    for asked in (["--model", "RUN", "--questions", "q"], ["RUN", "--tasks", "pope", "--data", str(tmp_path)]):
        assert evaluate.main([*asked, "--num-workers", "2", "--compile"]) == 0
        assert evaluate.main(asked) == 0

    assert seen == [(2, True), (None, False)] * 2
