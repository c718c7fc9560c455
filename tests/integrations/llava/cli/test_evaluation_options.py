"""`train --eval-data … --eval-task …`: what a stage is measured on while it trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.cli.task_score import task_score
from integrations.llava.cli.train import main
from integrations.llava.evaluation.judged import JudgedTask
from integrations.llava.evaluation.runner import evaluate
from integrations.llava.evaluation.task import TASKS, Question
from tests.integrations.llava.tiny_parts import tiny_overrides


@pytest.fixture(scope="module")
def asked(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `exact_match`: four questions about two images."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "images").mkdir()
    for name in ("0.png", "1.png"):
        shutil.copy(data_folder / name, folder / "images" / name)
    rows = [
        {"question_id": i, "image": f"{i % 2}.png", "text": "What number is it?", "kind": "exact_match", "answer": "0"}
        for i in range(4)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def arguments(backbone_folder: Path, llm_folder: Path, data_folder: Path, tmp_path: Path) -> list[str]:
    given = ["--recipe", "llava15_7b", "--output", str(tmp_path / "run")]
    for key, value in tiny_overrides(backbone_folder, llm_folder, data_folder).items():
        given += [f"--{key}", str(value)]
    return given


def measured(folder: Path, stage: str) -> dict[int, set[str]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {*row} - {"stage", "step"} for row in rows if row["stage"] == stage and "loss" not in row}


def test_stages_are_measured_on_held_out_samples_and_on_a_task_where_they_ask_questions(
    arguments: list[str], asked: Path, data_folder: Path, tmp_path: Path
) -> None:
    held_out = [str(data_folder / "pretrain.json"), str(data_folder / "train.json")]
    options = ["--eval-data", *held_out, "--eval-every", "2", "--eval-task", "exact_match"]
    assert main([*arguments, *options, "--eval-task-data", str(asked)]) == 0

    assert measured(tmp_path / "run", "pretrain") == {key: {"eval_loss"} for key in [2, 3]}
    assert measured(tmp_path / "run", "finetune") == {key: {"eval_loss", "eval_exact_match"} for key in [2, 3]}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluation = evaluate(tmp_path / "run", TASKS.get("exact_match")(), asked)
    assert evaluation is not None
    assert rows[-1]["eval_exact_match"] == evaluation.kinds["exact_match"].accuracy


def test_a_task_alone_can_be_what_the_best_weights_are_told_by(
    arguments: list[str], asked: Path, tmp_path: Path
) -> None:
    options = [
        "--stages",
        "finetune",
        "--adapter",
        "random",
        "--eval-task",
        "exact_match",
        "--eval-task-data",
        str(asked),
    ]
    best = ["--finetune.validation.keep_best", "true", "--finetune.validation.best_by", "exact_match"]
    assert main([*arguments, *options, *best, "--eval-every", "1"]) == 0
    # No answer is right, so that the first evaluation is as good as any.
    noted = json.loads((tmp_path / "run" / "run.json").read_text())["best"]["finetune"]
    assert noted == {"step": 1, "exact_match": 0.0, "last_step": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval-task", "pope"], "--eval-task NAME and --eval-task-data DIR go together"),
        (["--eval-task", "popes", "--eval-task-data", "."], "did you mean 'pope'"),
        (["--eval-task", "exact_match", "--eval-task-data", "nowhere"], "questions.jsonl does not exist"),
        (["--eval-data", "a.json", "b.json", "c.json"], "--eval-data names 3 paths for the stages pretrain, finetune"),
        (["--eval-every", "0"], "every=0 is too small; give at least 1"),
        (["--eval-data", "nowhere.json"], "data file nowhere.json does not exist"),
    ],
)
def test_wrong_options_are_said_before_training_begins(
    options: list[str], message: str, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("judged", "where"), [(True, "by a judge"), (False, "on a server")])
def test_a_task_that_is_scored_elsewhere_is_refused(
    judged: bool, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base: Any = JudgedTask if judged else object

    class Elsewhere(base):
        def load(self, folder: Path) -> list[Question]:
            return [Question(1, (), "What?", "elsewhere", "x" if judged else None)]

    monkeypatch.setattr(TASKS, "get", lambda name: Elsewhere)
    monkeypatch.setattr(Elsewhere, "__abstractmethods__", frozenset(), raising=False)
    with pytest.raises(ValueError, match=f"task elsewhere is scored {where}, not while a model trains"):
        task_score("elsewhere", tmp_path)
