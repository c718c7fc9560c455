"""An evaluation that is ended at any moment keeps its answers, and goes on from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from integrations.llava.cli.evaluate import main
from integrations.llava.evaluation import Evaluation, evaluate, read_predictions
from integrations.llava.inference.predictor import Predictor

COUNT = 6


@pytest.fixture
def questions(tmp_path: Path, data_folder: Path) -> Path:
    """Six questions about images of `data_folder`."""
    rows = [
        {"question_id": n, "image": f"{n}.png", "text": "What?" + " Sure?" * n, "kind": "color", "answer": "red"}
        for n in range(COUNT)
    ]
    return write(tmp_path / "questions.jsonl", rows)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class KilledError(BaseException):
    """Stands for whatever ends a process."""


class Counter:
    """Counts the questions that models are asked, and ends the process at a batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked, self.last = 0, COUNT
        whole = Predictor.answer_batch

        def answer_batch(own: Predictor, batch: Mapping[str, Any], keys: Any, sampling: Any) -> list[str]:
            if self.asked >= self.last:
                raise KilledError
            self.asked += len(keys)
            return whole(own, batch, keys, sampling)

        monkeypatch.setattr(Predictor, "answer_batch", answer_batch)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Counts questions."""
    return Counter(monkeypatch)


def run_it(run: Path, questions: Path, images: Path, output: Path, **options: Any) -> Evaluation:
    settings = {"batch_size": 2, "max_new_tokens": 4, "device": "cpu"} | options
    evaluation = evaluate(run, questions, images, output=output, **settings)
    assert evaluation is not None
    return evaluation


def test_an_evaluation_with_stop_strings_is_another(
    run: Path, questions: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run_it(run, questions, data_folder, out)
    text = read_predictions(out / "predictions.jsonl")[0]["prediction"]
    run_it(run, questions, data_folder, out, stop=(text[1:3],), overwrite=True)
    assert read_predictions(out / "predictions.jsonl")[0]["prediction"] == text[:1]
    command = ["--model", run, "--questions", questions, "--image-folder", data_folder, "--output", out]
    command += ["--max-new-tokens", "4", "--device", "cpu", "--stop"]
    assert main([*map(str, command), text[1:3]]) == 0
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, command), "other"])
    assert "was answered by another model or under other settings" in capsys.readouterr().err


def test_a_killed_evaluation_keeps_its_answers_and_asks_only_what_is_left(
    run: Path, questions: Path, data_folder: Path, tmp_path: Path, counter: Counter
) -> None:
    whole = run_it(run, questions, data_folder, tmp_path / "whole")
    counter.asked, counter.last = 0, 4
    with pytest.raises(KilledError):
        run_it(run, questions, data_folder, tmp_path / "out")
    assert sum(len(path.read_bytes().split(b"\n")) - 1 for path in (tmp_path / "out").iterdir()) == 4

    counter.asked, counter.last = 0, COUNT
    assert run_it(run, questions, data_folder, tmp_path / "out") == whole
    assert counter.asked == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "answers.jsonl",
        "metrics.json",
        "predictions.jsonl",
    ]
    # Once more: nothing is asked, and no model is loaded.
    counter.asked = 0
    assert run_it(run, questions, data_folder, tmp_path / "out") == whole
    assert counter.asked == 0


def test_a_corrected_reference_is_scored_anew_without_asking(
    run: Path, questions: Path, data_folder: Path, tmp_path: Path, counter: Counter
) -> None:
    first = run_it(run, questions, data_folder, tmp_path / "out")
    rows = [json.loads(line) for line in questions.read_text().split("\n") if line]
    rows[0]["answer"] = first.answers[0].prediction
    write(questions, rows)
    counter.asked = 0
    again = run_it(run, questions, data_folder, tmp_path / "out")

    assert counter.asked == 0
    assert [answer.right for answer in again.answers] == [True] + [False] * (COUNT - 1)
    assert [answer.prediction for answer in again.answers] == [answer.prediction for answer in first.answers]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["mean_accuracy"] == pytest.approx(1 / COUNT)


def test_without_an_output_nothing_is_written(
    run: Path, questions: Path, data_folder: Path, tmp_path: Path, counter: Counter
) -> None:
    before = sorted(tmp_path.rglob("*"))
    evaluation = evaluate(run, questions, data_folder, max_new_tokens=4, device="cpu")

    assert evaluation is not None
    assert len(evaluation.answers) == COUNT
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    run: Path, questions: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "integrations.llava.inference.predictor.load_model", lambda *_, **__: pytest.fail("weights were read")
    )
    (tmp_path / "file").touch()

    with pytest.raises(OSError, match="cannot be written .* Nothing was asked yet; give an output"):
        run_it(run, questions, data_folder, tmp_path / "file")


def test_other_settings_questions_and_earlier_predictions_are_refused(
    run: Path, questions: Path, data_folder: Path, tmp_path: Path, counter: Counter, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", run, "--questions", questions, "--images", data_folder, "--device", "cpu"]
    command += ["--output", tmp_path / "out", "--max-new-tokens"]
    assert main([*map(str, command), "4"]) == 0
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, command), "5"])
    assert "under other settings" in capsys.readouterr().err

    # As version 0.1 left it: predictions, and no answers that say where they come from.
    predictions = tmp_path / "out" / "predictions.jsonl"
    (tmp_path / "out" / "answers.jsonl").unlink()
    before = predictions.read_bytes()
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, command), "4"])
    assert "holds other predictions, and is left alone" in capsys.readouterr().err
    assert predictions.read_bytes() == before

    counter.asked = 0
    assert main([*map(str, command), "5", "--overwrite"]) == 0
    assert counter.asked == COUNT
    assert len(read_predictions(predictions)) == COUNT


def test_a_prompt_that_leaves_no_room_for_its_answer_is_refused_by_id(
    run: Path, questions: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "integrations.llava.inference.predictor.load_model", lambda *_, **__: pytest.fail("weights were read")
    )

    with pytest.raises(ValueError, match=r"6 problems in the questions(.*\n)+.*id 0: .*its answer up to 510, and"):
        evaluate(run, questions, data_folder, max_new_tokens=510, device="cpu")


def test_a_device_that_is_not_there_is_refused(
    questions: Path, run: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", run, "--questions", questions, "--images", data_folder, "--device", "cuda:99"]
    with pytest.raises(SystemExit, match="2"):
        main([*map(str, command)])
    assert "device 'cuda:99' cannot be used" in capsys.readouterr().err


def test_a_real_error_keeps_its_traceback(
    run: Path, questions: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Image.Image:
        raise ValueError("of the program")

    monkeypatch.setattr("integrations.llava.inference.predictor.load_model", fail)
    with pytest.raises(ValueError, match="of the program"):
        main(
            [
                "--model",
                str(run),
                "--questions",
                str(questions),
                "--images",
                str(data_folder),
                "--output",
                str(tmp_path),
            ]
        )
