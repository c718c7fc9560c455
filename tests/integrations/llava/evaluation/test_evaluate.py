from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from integrations.llava.cli.evaluate import main
from integrations.llava.evaluation import evaluate, read_predictions, read_questions, score_answers
from integrations.llava.evaluation.report import Evaluation, write_evaluation
from integrations.llava.evaluation.scores import summarise

QUESTIONS = [
    {"question_id": 0, "image": "a.png", "text": "What does the text say?", "kind": "ocr", "answer": "K7F"},
    {"question_id": 1, "image": "a.png", "text": "Where is it?", "kind": "box", "answer": [0.0, 0.0, 0.5, 0.5]},
]
PREDICTIONS = [{"question_id": 1, "prediction": "[0, 0, 0.5, 0.5]"}, {"question_id": 0, "prediction": "K7X"}]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return write(tmp_path / "questions.jsonl", QUESTIONS)


def test_written_evaluation_reads_back_as_the_same_scores(questions: Path, tmp_path: Path) -> None:
    asked = read_questions(questions)
    answers = score_answers(asked, PREDICTIONS)
    write_evaluation(Evaluation(summarise(answers), answers), tmp_path / "out")
    again = score_answers(asked, read_predictions(tmp_path / "out" / "predictions.jsonl"))
    assert again == answers
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["num_questions"] == 2
    assert metrics["mean_accuracy"] == 0.5
    assert metrics["kinds"]["box"] == {"num_questions": 1, "accuracy": 1.0, "iou": 1.0}
    assert metrics["kinds"]["ocr"]["character_accuracy"] == pytest.approx(2 / 3)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "predictions.jsonl"]


def test_command_scores_a_predictions_file(questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predictions = write(tmp_path / "predictions.jsonl", PREDICTIONS)
    given = ["--questions", str(questions), "--predictions", str(predictions), "--output", str(tmp_path / "out")]
    assert main(given) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["ocr", "1", "0.0", "%", "character_accuracy", "0.667"]
    assert lines[-1].split() == ["mean", "2", "50.0", "%"]
    assert (tmp_path / "out" / "metrics.json").is_file()


def test_command_help_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    from integrations.llava.__main__ import main as command

    with pytest.raises(SystemExit) as stop:
        command(["evaluate", "--help"])
    assert stop.value.code == 0
    assert "--questions" in capsys.readouterr().out


@pytest.mark.parametrize("extra", [[], ["--model", "a", "--predictions", "b"]])
def test_command_wants_either_model_or_predictions(
    extra: list[str], questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--questions", str(questions), *extra])
    assert "give either --model FOLDER or --predictions FILE" in capsys.readouterr().err


def test_command_words_a_missing_prediction_without_traceback(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions = write(tmp_path / "predictions.jsonl", PREDICTIONS[:1])
    with pytest.raises(SystemExit):
        main(["--questions", str(questions), "--predictions", str(predictions)])
    assert "1 missing: 0" in capsys.readouterr().err


def test_missing_images_are_found_before_the_model_is_looked_for(questions: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images are missing"):
        evaluate(tmp_path / "no_model", questions, tmp_path)


def test_folder_without_model_is_an_error(questions: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="no_model"):
        evaluate(tmp_path / "no_model", questions, tmp_path)


def test_faulty_predictions_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl does not exist"):
        read_predictions(tmp_path / "none.jsonl")
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"question_id": 0, "prediction": "a"}\n\n{')
    with pytest.raises(ValueError, match="line 3 is not JSON"):
        read_predictions(path)
    path.write_text('{"question_id": 0}\n')
    with pytest.raises(ValueError, match="line 1 lacks question_id or prediction"):
        read_predictions(path)
    path.write_text('{"question_id": 0, "prediction": null}\n')
    with pytest.raises(ValueError, match="line 1: expected numbers or texts .*; got 0 and null"):
        read_predictions(path)


def test_an_answer_with_any_line_break_is_read_as_it_was_written(questions: Path, tmp_path: Path) -> None:
    asked = read_questions(questions)
    said = "one\u2028two\u0085three\u2029\x0b\x0c\x1c\x1d\x1efour\r\nfive"
    answers = score_answers(asked, [{"question_id": 0, "prediction": said}, {"question_id": 1, "prediction": said}])
    write_evaluation(Evaluation(summarise(answers), answers), tmp_path / "out")

    assert score_answers(asked, read_predictions(tmp_path / "out" / "predictions.jsonl")) == answers


def test_other_predictions_are_overwritten_only_if_asked_for(
    questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write(tmp_path / "first.jsonl", PREDICTIONS)
    second = write(tmp_path / "second.jsonl", [{**PREDICTIONS[0], "prediction": "[0, 0, 1, 1]"}, PREDICTIONS[1]])
    command = ["--questions", str(questions), "--output", str(tmp_path / "out"), "--predictions"]
    assert main([*command, str(first)]) == 0
    assert main([*command, str(first)]) == 0  # the same, scored again
    written = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main([*command, str(second)])

    assert "holds other predictions, and is left alone. Give another output, or" in capsys.readouterr().err
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == written
    assert main([*command, str(second), "--overwrite"]) == 0
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() != written


def test_scores_that_cannot_be_written_are_told_with_the_place(questions: Path, tmp_path: Path, capsys: Any) -> None:
    predictions = write(tmp_path / "predictions.jsonl", PREDICTIONS)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["--questions", str(questions), "--predictions", str(predictions), "--output", str(tmp_path / "file")])
    assert "cannot be written (" in capsys.readouterr().err
