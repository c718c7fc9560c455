"""A stage that is measured while it trains: the same training, right numbers, the best weights, an early end."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from integrations.llava.checkpoints.model_io import load_model
from integrations.llava.config.schema import LoraConfig, Recipe
from integrations.llava.config.validation import ValidationConfig
from integrations.llava.config.yaml_io import dump_recipe
from integrations.llava.training.signals import RunInterrupted
from integrations.llava.training.train import train
from integrations.llava.training.validation import Score
from tests.integrations.llava.tiny_parts import human_and_gpt
from tests.integrations.llava.training.process_pairs import Nursery
from tests.integrations.llava.training.test_resume import StopAt
from tests.integrations.llava.training.tiny_training import read_rows
from tests.integrations.llava.training.validation_worker import BEST


@pytest.fixture(scope="module")
def held_out(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five samples of two sources, of which three have images of `data_folder`."""
    samples = [
        {
            "image": f"{index}.png",
            "source": "seen",
            "conversations": human_and_gpt("<image>\nHow many?", "five " * index),
        }
        for index in (1, 3, 5)
    ]
    samples += [{"source": "read", "conversations": human_and_gpt("Say it.", word)} for word in ("a red wall", "no")]
    file = tmp_path_factory.mktemp("held_out") / "held_out.json"
    file.write_text(json.dumps([sample | {"id": f"h{index}"} for index, sample in enumerate(samples)]))
    return file


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe) -> Recipe:
    """A finetune whose steps do not depend on how many there are."""
    return finetuned(tiny_recipe, max_steps=4, scheduler="constant", warmup_ratio=0.0, micro_batch_size=2)


def finetuned(recipe: Recipe, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, finetune=dataclasses.replace(recipe.finetune, **changes))


def watched(
    recipe: Recipe,
    path: Path | str | tuple[str, ...] = "",
    *,
    changes: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Recipe:
    """The recipe with these settings of its finetune's validation."""
    return finetuned(
        recipe,
        validation=ValidationConfig(path=path if isinstance(path, tuple) else str(path), **settings),
        **(changes or {}),
    )


def finetune(recipe: Recipe, folder: Path, *callbacks: TrainerCallback, scores: Sequence[Score] = ()) -> Path:
    return train(recipe, folder, stages=["finetune"], adapter="random", callbacks=callbacks, scores=scores)


def steps(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder) if "loss" in row]


def evaluations(folder: Path, key: str = "eval_loss") -> dict[int, float]:
    rows = [row for row in read_rows(folder) if key in row]
    assert len({row["step"] for row in rows}) == len(rows)
    return {row["step"]: row[key] for row in rows}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(folder: Path, other: Path) -> None:
    ours, theirs = weights(folder), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Scripted(TrainerCallback):
    """A score that is known in advance: step -> value. Breaks training before a step if told so."""

    def __init__(self, values: Mapping[int, float], *, dies_before: int = 0) -> None:
        self.values, self.dies_before = values, dies_before
        self.step = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.step = state.global_step

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step + 1 == self.dies_before:
            raise RuntimeError("power cut")
        self.step = state.global_step + 1

    @property
    def score(self) -> Score:
        return Score("luck", lambda model, processor: self.values[self.step])


def scripted(
    recipe: Recipe, folder: Path, values: Mapping[int, float], *callbacks: TrainerCallback, **given: Any
) -> Path:
    script = Scripted(values, **given)
    return finetune(recipe, folder, script, *callbacks, scores=[script.score])


def test_losses_are_the_same_bits_with_and_without_validation(recipe: Recipe, held_out: Path, tmp_path: Path) -> None:
    def draw(model: Any, processor: Any) -> float:
        return random.random() + float(np.random.random()) + float(torch.rand(()))

    dropped = finetuned(recipe, lora=LoraConfig(rank=2, dropout=0.5, target_modules=("q_proj", "v_proj")))
    plain = finetune(dropped, tmp_path / "plain")
    seen = finetune(watched(dropped, held_out, every=1, at_start=True), tmp_path / "seen", scores=[Score("draw", draw)])

    assert steps(seen) == steps(plain)
    assert list(evaluations(seen)) == list(evaluations(seen, "eval_draw")) == [0, 1, 2, 3, 4]
    assert_same_weights(seen, plain)


@pytest.mark.parametrize(("padding_free", "in_files"), [(False, False), (True, True)])
def test_the_loss_is_the_mean_over_all_supervised_tokens_and_over_those_of_each_source(
    padding_free: bool, in_files: bool, recipe: Recipe, held_out: Path, data_folder: Path, tmp_path: Path
) -> None:
    """A source is what samples name, or else the file that they are in."""
    from integrations.llava.data import Collator, ConversationDataset, read_samples
    from integrations.llava.prompts import TextEncoder, get_template

    path: str | tuple[str, ...] = str(held_out)
    if in_files:
        path = tuple(str(tmp_path / name) for name in ("seen", "read"))
        for name in ("seen", "read"):
            own = [sample for sample in json.loads(held_out.read_text()) if sample["source"] == name]
            (tmp_path / name).write_text(
                json.dumps([{k: v for k, v in sample.items() if k != "source"} for sample in own])
            )
    folder = finetune(watched(recipe, path, every=3, changes={"padding_free": padding_free}), tmp_path / "run")
    assert list(evaluations(folder)) == [3, 4]

    model, tokenizer = load_model(folder).eval(), _tokenizer(folder)
    dataset = ConversationDataset(
        read_samples(held_out),
        image_folder=data_folder,
        template=get_template("v1"),
        encoder=TextEncoder(tokenizer),
        preprocessing=model.model.vision_tower.backbone.preprocessing.changed(mode="pad"),
        layout=model.config.layout,
    )
    sums: dict[str, list[float]] = {}
    for index in range(len(dataset)):
        batch = Collator(0)([dataset[index]])
        labels = batch["labels"][:, 1:]
        with torch.no_grad():
            given = {key: value for key, value in batch.items() if key not in ("labels", "sample_ids")}
            logits = model(**given).logits[:, :-1]
        logits[..., model.config.image_token_index] = -torch.inf
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="sum")
        for name in ("", f"/{dataset.samples[index]['source']}"):
            sums.setdefault(name, [0.0, 0.0])
            sums[name][0] += float(loss)
            sums[name][1] += float((labels != -100).sum())
    row = next(row for row in read_rows(folder) if row["step"] == 4 and "eval_loss" in row)
    expected = {f"eval_loss{name}": total / count for name, (total, count) in sums.items()}
    assert row.keys() == {"stage", "step", *expected}
    assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def _tokenizer(folder: Path) -> Any:
    from integrations.llava.checkpoints import load_processor

    return load_processor(folder).tokenizer


@pytest.mark.parametrize(("every", "expected"), [(None, [1, 2, 3, 4]), (2, [2, 4]), (3, [3, 4]), (9, [4])])
def test_evaluations_come_at_intervals_and_at_the_end(
    every: int | None, expected: list[int], recipe: Recipe, tmp_path: Path
) -> None:
    folder = scripted(watched(recipe, every=every), tmp_path / "run", dict.fromkeys(range(5), 0.5))
    assert list(evaluations(folder, "eval_luck")) == expected
    assert [(row["step"], "loss" in row) for row in read_rows(folder) if row["step"] == 4] == [(4, True), (4, False)]


def test_evaluations_go_to_reporters_under_their_step(recipe: Recipe, held_out: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = finetune(watched(recipe, held_out, every=2, at_start=True), tmp_path / "run")
    events = EventAccumulator(str(folder / "logs" / "finetune")).Reload()
    assert {"eval/loss", "eval/loss/seen", "eval/loss/read"} <= set(events.Tags()["scalars"])
    told = {event.step: event.value for event in events.Scalars("eval/loss")}
    assert told == pytest.approx(evaluations(folder), rel=1e-6)
    assert list(told) == [0, 2, 4]
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_the_best_weights_are_what_the_stage_leaves(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    best = watched(recipe, every=1, keep_best=True, best_by="luck")
    folder = scripted(best, tmp_path / "best", {1: 0.1, 2: 0.7, 3: 0.7, 4: 0.2})

    assert_same_weights(folder, finetune(finetuned(recipe, max_steps=2), tmp_path / "two"))
    assert json.loads((folder / "run.json").read_text())["best"] == {
        "finetune": {"step": 2, "luck": 0.7, "last_step": 4}
    }
    assert (
        "stage finetune leaves the weights of step 2, its best evaluation (luck 0.7000); its last step was 4"
        in caplog.text
    )
    assert sorted(path.name for path in (folder / "finetune").iterdir()) == ["adapter.safetensors"]


def test_the_lowest_loss_is_the_best(recipe: Recipe, held_out: Path, tmp_path: Path) -> None:
    rising = watched(recipe, held_out, every=1, keep_best=True, changes={"learning_rate": 0.5, "learning_rates": {}})
    folder = finetune(rising, tmp_path / "run")
    found = evaluations(folder)
    assert max(found.values()) > min(found.values())
    noted = json.loads((folder / "run.json").read_text())["best"]["finetune"]
    assert noted == {"step": min(found, key=lambda step: found[step]), "loss": min(found.values()), "last_step": 4}


def test_a_stopped_run_ends_with_the_best_weights_and_the_log_of_one_that_was_not(
    recipe: Recipe, tmp_path: Path
) -> None:
    values = {1: 0.1, 2: 0.7, 3: 0.3, 4: 0.2}
    best = watched(recipe, every=1, keep_best=True, best_by="luck")
    whole = scripted(best, tmp_path / "whole", values)
    for step in (2, 3):
        with pytest.raises(RunInterrupted):
            scripted(best, tmp_path / "stopped", values, StopAt("finetune", step))
    stopped = scripted(best, tmp_path / "stopped", values)

    assert read_rows(stopped) == read_rows(whole)
    assert_same_weights(stopped, whole)


def test_weights_that_were_best_at_a_checkpoint_stay_until_it_goes(recipe: Recipe, tmp_path: Path) -> None:
    """The run dies after better ones, and finds others worse when it makes the steps again."""
    best = watched(recipe, every=1, keep_best=True, best_by="luck", changes={"save_every": 2})
    with pytest.raises(RuntimeError, match="power cut"):
        scripted(best, tmp_path / "run", {1: 0.5, 2: 0.2, 3: 0.9}, dies_before=4)
    kept = tmp_path / "run" / "finetune" / "best"
    assert sorted(path.name for path in kept.iterdir()) == ["step-1.safetensors", "step-3.safetensors"]
    folder = scripted(best, tmp_path / "run", {3: 0.1, 4: 0.1})

    assert_same_weights(folder, finetune(finetuned(recipe, max_steps=1), tmp_path / "one"))


def test_best_weights_that_are_gone_are_said_before_a_step_is_made(recipe: Recipe, tmp_path: Path) -> None:
    best = watched(recipe, every=1, keep_best=True, best_by="luck", changes={"save_every": 2})
    with pytest.raises(RuntimeError, match="power cut"):
        scripted(best, tmp_path / "run", {1: 0.5, 2: 0.2, 3: 0.1}, dies_before=4)
    (tmp_path / "run" / "finetune" / "best" / "step-1.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"the weights of the best evaluation, that of step 1, are gone: .*step-1"
    ):
        scripted(best, tmp_path / "run", {})


def test_a_stage_ends_after_as_many_worse_evaluations_as_it_has_patience(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    patient = watched(recipe, every=1, patience=2, best_by="luck")
    folder = scripted(patient, tmp_path / "run", {1: 0.4, 2: 0.4, 3: 0.3})
    assert list(evaluations(folder, "eval_luck")) == [row["step"] for row in steps(folder)] == [1, 2, 3]
    assert (
        "stage finetune ends at step 3 of 4: 2 evaluations in a row were no better than that of step 1" in caplog.text
    )
    assert_same_weights(folder, finetune(finetuned(recipe, max_steps=3), tmp_path / "three"))


class _DiesAtEnd(TrainerCallback):
    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        raise RuntimeError("power cut")


def test_a_run_that_ended_early_and_died_makes_no_further_step(recipe: Recipe, tmp_path: Path) -> None:
    patient = watched(recipe, every=1, patience=1, best_by="luck", changes={"save_every": 2})
    with pytest.raises(RuntimeError, match="power cut"):
        scripted(patient, tmp_path / "run", {1: 0.4, 2: 0.3}, _DiesAtEnd())
    folder = scripted(patient, tmp_path / "run", {})
    assert [row["step"] for row in read_rows(folder)] == [1, 1, 2, 2]
    assert (folder / "model.safetensors").is_file()


def test_a_score_asks_the_model_in_training_and_training_goes_on(
    recipe: Recipe, data_folder: Path, tmp_path: Path, pictures: list[Any]
) -> None:
    """What the predictor leaves behind, such as tensors of inference mode, would break the next step."""
    from integrations.llava.inference import Predictor

    said: list[list[str]] = []

    def ask(model: Any, processor: Any) -> float:
        said.append(Predictor(model, processor)(pictures[:2], ["What number is it?"] * 2, max_new_tokens=4))
        return 0.5

    trained = {"trainable": ("backbone", "fuser", "projector", "llm")}
    asked = finetuned(recipe, **trained)
    folder = finetune(watched(asked, every=1, at_start=True), tmp_path / "asked", scores=[Score("number", ask)])
    assert len(said) == 5
    assert steps(folder) == steps(finetune(asked, tmp_path / "plain"))


def test_two_processes_measure_and_keep_what_one_does(
    recipe: Recipe, held_out: Path, tmp_path: Path, nursery: Nursery
) -> None:
    """Three batches fall to two processes."""
    best = watched(recipe, held_out, every=1, keep_best=True, changes={"max_steps": 3})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(best))
    before = finetune(finetuned(recipe, max_steps=1), tmp_path / "before")
    shutil.copy(before / "finetune" / "adapter.safetensors", tmp_path)
    with nursery.alone("validation_worker:main", str(tmp_path), "ddp", "single") as alone:
        assert alone.wait().code == 0, alone.wait()
    for engine in ("ddp", "fsdp2"):
        ended = nursery.run("validation_worker:main", str(tmp_path), engine, engine)
        assert [each.code for each in ended] == [0, 0], "\n".join(f"{each}" for each in ended)

        single, ours = (evaluations(tmp_path / name, "eval_measured") for name in ("single", engine))
        assert ours == pytest.approx(single, abs=1e-5)
        noted = json.loads((tmp_path / engine / "run.json").read_text())["best"]["finetune"]
        assert noted == {"step": BEST, "loss": 0.0, "last_step": 3}
        found = weights(tmp_path / engine)
        for name, tensor in weights(tmp_path / "single").items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "names", "message"),
    [
        ({"keep_best": True}, [], "keep_best and validation.patience compare evaluations, and there are none"),
        ({"patience": 2}, [], "keep_best and validation.patience compare evaluations, and there are none"),
        ({"keep_best": True}, ["luck"], "validation.best_by 'loss' is unknown.*luck"),
        ({"patience": 2, "best_by": "lick"}, ["luck"], "did you mean 'luck'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_data_are_read(
    settings: dict[str, Any], names: list[str], message: str, recipe: Recipe, tmp_path: Path
) -> None:
    scores = [Score(name, lambda model, processor: 0.0) for name in names]
    with pytest.raises(ValueError, match=f"stage finetune: .*{message}"):
        finetune(watched(recipe, **settings), tmp_path / "run", scores=scores)
    assert not (tmp_path / "run").exists()


def test_a_score_is_refused_where_no_process_has_the_whole_model(recipe: Recipe) -> None:
    from integrations.llava.training.validation import check_validation

    scores = [Score("luck", lambda model, processor: 0.0)]
    sharded = finetuned(recipe, engine="fsdp2").finetune
    check_validation(sharded, scores, num_processes=1)
    with pytest.raises(ValueError, match="engine 'fsdp2' may take it apart; use 'ddp'"):
        check_validation(sharded, scores, num_processes=2)


def test_faults_of_held_out_samples_are_said_before_a_step_is_made(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "held_out.json"
    file.write_text(json.dumps([{"id": "x", "image": "none.png", "conversations": human_and_gpt("<image>\nHm?", "a")}]))
    with pytest.raises(ValueError, match=r"held-out samples \(validation.path\): 1 problems in the data .*"):
        finetune(watched(recipe, file), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_held_out_samples_without_a_label_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    file = tmp_path / "held_out.json"
    file.write_text(json.dumps([{"id": "long", "conversations": human_and_gpt("a wall " * 2000, "a")}]))
    with pytest.raises(ValueError, match="no token of the held-out samples .* has a label"):
        finetune(watched(recipe, file, at_start=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_may_go_on_with_other_held_out_samples_unless_its_result_depends_on_them(
    recipe: Recipe, held_out: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunInterrupted):
        finetune(recipe, tmp_path / "run", StopAt("finetune", 2))
    with pytest.raises(ValueError, match=r"finetune\.validation\.keep_best \(False then, True now\)"):
        finetune(watched(recipe, held_out, keep_best=True), tmp_path / "run")
    folder = finetune(watched(recipe, held_out, every=1), tmp_path / "run")
    # What was due when it stopped is made up for.
    assert list(evaluations(folder)) == [2, 3, 4]
