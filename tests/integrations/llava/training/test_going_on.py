"""Going on from a model (`--from`): what is taken over, what learns, how a run resumes, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from integrations.llava.checkpoints import load_model, load_processor, model_source
from integrations.llava.cli import train as train_command
from integrations.llava.config import Recipe, load_recipe
from integrations.llava.training import RunFolder, train
from integrations.llava.training.signals import RunInterrupted
from layerfuse.errors import InputError, MissingFileError
from tests.integrations.llava.inference.answering_parts import save_run
from tests.integrations.llava.training.test_resume import StopAt, rows
from tests.integrations.llava.training.test_run_starts import content

LORA = {"finetune.lora.rank": 2, "finetune.lora.target_modules": ["q_proj", "down_proj"]}


def settings(data: Path, **changes: Any) -> dict[str, Any]:
    """What a small finetune on `data_folder` says."""
    small = {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01, "warmup_ratio": 0.0, "log_every": 1} | changes
    paths = {"data.path": str(data / "train.json"), "data.image_folder": str(data)}
    return {f"finetune.{key}": value for key, value in {**paths, **small}.items()}


def going_on(model: Path, data: Path, overrides: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    return load_recipe(None, {"model.checkpoint": str(model), **settings(data, **changes), **(overrides or {})})


def command(data: Path, *arguments: str) -> list[str]:
    said = [word for key, value in settings(data).items() for word in (f"--{key}", str(value))]
    return [*arguments, *said]


@pytest.fixture(scope="module")
def brief(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained with another template, and with images squashed."""
    folder = save_run(tmp_path_factory.mktemp("brief") / "model", backbone_folder, width=64, template="brief")
    file = folder / "processor_config.json"
    described = json.loads(file.read_text())
    described["image_processor"]["preprocessing"]["mode"] = "squash"
    file.write_text(json.dumps(described))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"repetition_penalty": 1.25}))
    return folder


def test_what_is_not_said_is_the_model_s_own(brief: Path, data_folder: Path, tmp_path: Path) -> None:
    folder = train(going_on(brief, data_folder, max_steps=1), tmp_path / "run")

    noted = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert noted["finetune"]["template"] == "brief" and noted["finetune"]["data"]["image_mode"] == "squash"
    assert noted["model"].keys() == {"checkpoint", "checkpoint_digest", "attention"}
    model, before = load_model(folder), load_model(brief)
    assert model.config.prompt_template == before.config.prompt_template
    assert model.config.fuser == before.config.fuser
    assert model.generation_config.repetition_penalty == 1.25
    ours, theirs = load_processor(folder), load_processor(brief)
    assert ours.image_processor.preprocessing["mode"] == "squash"
    assert ours.chat_template == theirs.chat_template
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    # One finetune, which is what is meant where no stage is said.
    assert RunFolder(folder).finished == ("finetune",)


def test_a_template_that_has_no_name_here_is_the_model_s_own(brief: Path, data_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(brief, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config["prompt_template"]["system"] = "Own."
    (folder / "config.json").write_text(json.dumps(config))
    recipe = going_on(folder, data_folder)
    source = model_source(recipe.model)
    resolved = source.resolved(recipe)

    assert resolved.finetune.template == "model"
    assert source.template(resolved.finetune).to_dict() == config["prompt_template"]
    assert model_source(going_on(brief, data_folder).model).resolved(recipe).finetune.template == "brief"


def test_another_template_counts_where_it_is_said_and_a_recipe_s_own_does_not(brief: Path) -> None:
    given = {"model.checkpoint": str(brief), "finetune.template": "v1"}
    recipe = load_recipe("mmfuser_7b_lora", given)

    assert recipe.model.fuser_options == load_recipe().model.fuser_options
    assert recipe.finetune.lora.rank == 128 and recipe.name == "mmfuser_7b_lora"
    assert recipe.finetune.template == "v1" and recipe.pretrain.template == "model"
    assert recipe.pretrain.data.image_mode == recipe.finetune.data.image_mode == "model"


def test_a_recipe_file_may_name_its_model_and_what_it_says_besides_counts(brief: Path, tmp_path: Path) -> None:
    shutil.copytree(brief, tmp_path / "model")
    file = tmp_path / "mine.yaml"
    file.write_text("base: mmfuser_7b\nmodel: {checkpoint: ./model}\nfinetune: {template: v1}\n")
    recipe = load_recipe(file)

    assert recipe.model.checkpoint == str(tmp_path / "model") and recipe.finetune.template == "v1"
    assert recipe.pretrain.template == "model" and recipe.finetune.precision == "bf16"
    other = load_recipe(file, {"model.checkpoint": str(brief)})
    assert other.model.checkpoint == str(brief) and other.finetune.template == "model"
    assert other.finetune.precision == "bf16"


@pytest.mark.parametrize("quantize", ["none", "int8", "nf4"])
def test_adapters_learn_on_the_model_s_own_weights_and_are_merged(
    quantize: str, brief: Path, data_folder: Path, tmp_path: Path
) -> None:
    overrides = {**LORA, "finetune.lora.quantize": quantize}
    folder = train(going_on(brief, data_folder, overrides), tmp_path / "run")
    before, after = (load_file(each / "model.safetensors") for each in (brief, folder))

    assert before.keys() == after.keys()
    learned = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    adapted = {name for name in before if name.endswith(("q_proj.weight", "down_proj.weight")) and "language" in name}
    assert {name for name in learned if "language_model" in name or "lm_head" in name} == adapted
    assert not any("vision_tower" in name for name in learned)
    assert "model.multi_modal_projector.linear_2.weight" in learned


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_what_is_trainable_moves_and_the_rest_keeps_its_bits(
    precision: str, brief: Path, data_folder: Path, tmp_path: Path
) -> None:
    recipe = going_on(
        brief, data_folder, trainable=["backbone", "fuser", "projector"], precision=precision, max_steps=2
    )
    folder = train(recipe, tmp_path / "run")
    before, after = (load_file(each / "model.safetensors") for each in (brief, folder))

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    learned = {name for name, tensor in before.items() if not torch.equal(tensor.to(dtype), after[name])}
    assert learned and not any(name.startswith(("model.language_model.", "lm_head.")) for name in learned)
    assert any("vision_tower" in name for name in learned)
    assert any("vision_tower" in name for name in load_file(folder / "finetune" / "adapter.safetensors"))


def test_what_learns_starts_from_the_stored_bits_whatever_the_precision(
    brief: Path, data_folder: Path, tmp_path: Path
) -> None:
    """The rest is rounded to bfloat16, in which it computes."""
    recipe = going_on(brief, data_folder, LORA, precision="bf16", learning_rate=0.0, max_steps=1)
    folder = train(recipe, tmp_path / "run")
    before, after = load_file(brief / "model.safetensors"), load_file(folder / "finetune" / "adapter.safetensors")
    assert after and all(torch.equal(before[name], tensor) for name, tensor in after.items())


def test_a_connector_is_trained_on_in_pretrain_and_then_the_language_model(
    brief: Path, data_folder: Path, tmp_path: Path
) -> None:
    more = {key.replace("finetune", "pretrain"): value for key, value in settings(data_folder).items()}
    recipe = going_on(brief, data_folder, more)
    folder = train(recipe, tmp_path / "run", stages=["pretrain", "finetune"])
    before = load_file(brief / "model.safetensors")
    first, second = (load_file(folder / stage / "adapter.safetensors") for stage in ("pretrain", "finetune"))

    name = "model.multi_modal_projector.linear_1.weight"
    assert (first[name] - before[name]).abs().max() < 0.1, "the connector began from the model's"
    assert not torch.equal(first[name], before[name]) and not torch.equal(first[name], second[name])
    origins = json.loads((folder / "run.json").read_text())["origins"]
    assert origins["pretrain"] == "checkpoint" and "pretrain/adapter.safetensors" in origins["finetune"]


def test_ctrl_c_and_again_gives_the_losses_of_an_uninterrupted_run(
    brief: Path, data_folder: Path, tmp_path: Path
) -> None:
    """The second start names neither the model nor the recipe: the folder knows both."""
    recipe = going_on(brief, data_folder, LORA, max_steps=4)
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(RunInterrupted) as stop:
        train(recipe, tmp_path / "stopped", callbacks=[StopAt("finetune", 2, signal.SIGINT)])
    assert stop.value.exit_code == 130
    assert train_command.main(["--output", str(tmp_path / "stopped")]) == 0

    assert rows(tmp_path / "stopped") == rows(whole)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("stopped", "whole"))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_run_goes_on_from_the_same_model_wherever_it_lies_now_and_from_no_other(
    brief: Path, run: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = tmp_path / "model", tmp_path / "run"
    shutil.copytree(brief, model)
    with pytest.raises(RunInterrupted):
        train(going_on(model, data_folder), folder, callbacks=[StopAt("finetune", 2)])

    with pytest.raises(InputError, match=rf"began from the model {model}, digest \w+, and now .* {run}, digest"):
        train(going_on(run, data_folder), folder)
    again = ["--output", str(folder)]
    config = (model / "config.json").read_text()
    (model / "config.json").write_text(config + "\n")
    assert train_command.main(again) == 2
    assert "its files have changed since" in capsys.readouterr().err
    (model / "config.json").write_text(config)
    model.rename(tmp_path / "moved")
    assert train_command.main(again) == 2
    said = capsys.readouterr().err
    assert f"began from {model}, which is not there any more" in said and "say where it is now (--from)" in said
    assert train_command.main(command(data_folder, *again, "--from", str(tmp_path / "moved"))) == 0
    assert [step for _, step, _ in rows(folder)] == [1, 2, 3]


def test_a_run_of_parts_does_not_go_on_from_a_model(
    tiny_recipe: Recipe, brief: Path, data_folder: Path, tmp_path: Path
) -> None:
    train(tiny_recipe, tmp_path / "run", stages=["pretrain"])
    with pytest.raises(InputError, match=r"began from the parts that its recipe names, and now .* the model"):
        train(going_on(brief, data_folder), tmp_path / "run")


def test_what_would_change_the_model_is_refused(brief: Path, data_folder: Path) -> None:
    for override in ("model.fuser", "model.llm"):
        with pytest.raises(InputError, match=rf"goes on from a model, .* {override} would change it; leave that out"):
            going_on(brief, data_folder, {override: "mmfuser"})
    with pytest.raises(InputError, match="taken as it is, and fuser would change it"):
        load_recipe().model.__class__(checkpoint=str(brief), fuser="average")
    with pytest.raises(InputError, match="checkpoint_base belongs to a checkpoint, and none is named"):
        load_recipe(None, {"model.checkpoint_base": "base"})


def test_a_model_in_the_place_of_an_adapter_or_a_language_model_is_told_what_to_do(
    tiny_recipe: Recipe, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"is a folder; name the file .* or go on from the whole model \(--from\)"):
        train(tiny_recipe, tmp_path / "run", stages=["finetune"], adapter=run)
    recipe = dataclasses.replace(tiny_recipe, model=dataclasses.replace(tiny_recipe.model, llm=str(run)))
    with pytest.raises(InputError, match="a whole model of images and text, .*; go on from the model as it is: --from"):
        train(recipe, tmp_path / "run")


def test_a_command_that_says_neither_recipe_nor_model_is_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_command.main(["--output", str(tmp_path / "run")]) == 2
    assert "nothing says what to train; name a recipe (--recipe)" in capsys.readouterr().err


def test_a_run_has_a_folder_that_is_not_its_model_s(
    brief: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(brief, tmp_path / "runs" / "mine")
    again = [
        "--recipe",
        "mmfuser_7b",
        "--from",
        "runs/mine",
        "--finetune.precision",
        "fp32",
        "--finetune.num_workers",
        "0",
    ]
    assert train_command.main(command(data_folder, *again, "--finetune.micro_batch_size", "4")) == 0
    assert RunFolder("runs/from_mine").finished == ("finetune",)
    assert content(tmp_path / "runs" / "mine") == content(brief)


def test_a_dry_run_knows_the_model(brief: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_command.main(command(data_folder, "--from", str(brief), "--dry-run")) == 0
    said = capsys.readouterr().out
    assert f"Dry run of {brief}" in said and "llama, 2 layers of 64" in said and "mmfuser: 4 maps" in said
    assert "12 samples, nothing found" in said and "pretrain" not in said


def _damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no weights")


def _no_template(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["prompt_template"] = {"style": "v1"}
    (folder / "config.json").write_text(json.dumps(config))


FAILURES: dict[str, tuple[Callable[[Path], object] | None, list[str], str]] = {
    "no model": (shutil.rmtree, [], "holds no config.json"),
    "damaged weights": (_damaged, [], "not a whole safetensors file"),
    "no template": (_no_template, [], "is {'style': 'v1'}, which is none"),
    "no such template": (None, ["--finetune.template", "v9"], "prompt template 'v9' is unknown"),
    "no such data": (None, ["--finetune.data.path", "nowhere.json"], "nowhere.json"),
    "bad data": (None, ["--finetune.data.path", "bad.json"], "(1 no conversation)"),
    "a new connector": (None, ["--adapter", "random"], "asks for a new fuser and projector"),
    "adapters for no layer": (None, ["--finetune.lora.rank", "2", "--finetune.lora.target_modules", "x"], "called x"),
    "parts": (None, ["--model.fuser", "average"], "model.fuser would change it"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_start_that_fails_leaves_the_folder_byte_for_byte(
    failure: str,
    overwrite: bool,
    run: Path,
    data_folder: Path,
    unfinished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One with an unfinished run, and one with files of the user's."""
    spoil, arguments, message = FAILURES[failure]
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text(json.dumps([{"id": "a", "conversations": "text"}]))
    model = Path(shutil.copytree(run, tmp_path / "model"))
    if spoil is not None:
        spoil(model)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    for folder in (Path(shutil.copytree(unfinished, tmp_path / "run")), mine, tmp_path / "new"):
        before = listing(folder)
        again = ["--overwrite"] * overwrite
        given = command(data_folder, "--from", str(model), "--output", str(folder), *again)
        assert train_command.main([*given, *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said or (folder.name == "run" and "holds a run of another recipe" in said)
        assert listing(folder) == before


@pytest.fixture(scope="module")
def unfinished(run: Path, data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped; nobody writes to it."""
    folder = tmp_path_factory.mktemp("unfinished") / "run"
    with pytest.raises(RunInterrupted):
        train(going_on(run, data_folder), folder, callbacks=[StopAt("finetune", 2)])
    return folder


def listing(folder: Path) -> dict[str, Any]:
    """All that a folder holds, folders and times of change included; None if there is none."""
    if not folder.exists():
        return {}
    places = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))]
    return {**dict.fromkeys(places), **content(folder)}


def test_the_run_s_own_folder_is_no_model_to_go_on_from(run: Path, data_folder: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(run, tmp_path / "model"))
    for overwrite in (False, True):
        with pytest.raises(InputError, match="is the model to go on from and the run's own folder"):
            train(going_on(model, data_folder), model, overwrite=overwrite)
    assert content(model) == content(run)


def test_a_second_start_in_the_folder_is_told_who_holds_it(run: Path, data_folder: Path, tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path / "run").locked(),
        pytest.raises(InputError, match=f"a training is running in .*: process {os.getpid()} on"),
    ):
        train(going_on(run, data_folder), tmp_path / "run")
    with pytest.raises(MissingFileError, match="holds no config.json"):
        train(going_on(tmp_path / "none", data_folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()
