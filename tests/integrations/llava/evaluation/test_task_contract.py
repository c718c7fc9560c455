"""The contract of tasks, tried with three that need it whole: pairs of questions (MME), F1 (POPE), ten answers (VQAv2).

They are loaded from files of their own, asked by two processes one of which is killed, and give numbers that were
worked out by hand.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.cli.evaluate import main
from integrations.llava.evaluation import (
    TASKS,
    ColorTask,
    Evaluation,
    Question,
    ScoredAnswer,
    Task,
    evaluate,
    predict,
    read_predictions,
    read_questions,
    score_predictions,
)
from integrations.llava.evaluation.tasks import YesNoTask
from integrations.llava.inference.batching import Shard
from integrations.llava.inference.predictor import Predictor


class MmeLike(Task):
    """Two questions an image; the second number counts images both of whose questions are right."""

    def load(self, folder: str | Path) -> list[Question]:
        lines = (Path(folder) / "existence.txt").read_text().splitlines()
        rows = [line.split("\t") for line in lines]
        return [Question(n, image, text, "mme", right.lower()) for n, (image, text, right) in enumerate(rows)]

    def prompt(self, question: Question) -> str:
        return f"{question.text} Please answer yes or no."

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        return {"accuracy": float(answer.lower().startswith(question.answer))}

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        pairs: dict[str, list[bool]] = defaultdict(list)
        for own in scores:
            pairs[own.question.images[0]].append(own.right)
        plus = sum(map(all, pairs.values())) / len(pairs)
        accuracy = super().aggregate(scores)["accuracy"]
        return {"accuracy": accuracy, "accuracy_plus": plus, "score": 100 * accuracy + 100 * plus}


class PopeLike(YesNoTask):
    """Yes is the positive answer; what is no clear yes or no counts as no."""

    question_file = "coco_pope.jsonl"

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        pairs = [(own.prediction.lower().startswith("yes"), own.question.answer == "yes") for own in scores]
        hits = pairs.count((True, True))
        said, right = sum(said for said, _ in pairs), sum(right for _, right in pairs)
        precision, recall = hits / said, hits / right
        f1 = 2 * precision * recall / (precision + recall)
        numbers = {"precision": precision, "recall": recall, "f1": f1, "yes_ratio": said / len(pairs)}
        return {**super().aggregate(scores), **numbers}


class VqaLike(Task):
    """Ten people's answers; the server wants every question of the test set, those that were not asked, too."""

    def load(self, folder: str | Path) -> list[Question]:
        content = json.loads((Path(folder) / "vqa.json").read_text())
        self.all_ids = content["all_ids"]
        return [
            Question(row["id"], row["image"], row["question"], "vqa", tuple(row["answers"]), {"type": row["type"]})
            for row in content["questions"]
        ]

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        people = question.answer
        others = [[one for j, one in enumerate(people) if j != i] for i in range(len(people))]
        return {"accuracy": sum(min(own.count(answer.lower()) / 3, 1) for own in others) / len(people)}

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        types = dict.fromkeys(own.question.fields["type"] for own in scores)
        parts = {name: [own for own in scores if own.question.fields["type"] == name] for name in types}
        each = {name: Task.aggregate(self, own)["accuracy"] for name, own in parts.items()}
        return {**Task.aggregate(self, scores), **each}

    def submission(self, predictions: Sequence[ScoredAnswer]) -> Mapping[str, bytes]:
        said = {own.question.question_id: own.prediction.lower() for own in predictions}
        rows = [{"question_id": own_id, "answer": said.get(own_id, "")} for own_id in self.all_ids]
        return {"vqav2_test.json": json.dumps(rows).encode()}


class KilledError(BaseException):
    """Stands for whatever ends a process."""


class Stub:
    """Says what it was told to, by id; counts what it is asked, and is killed at the second batch if asked to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.says: dict[Any, str] = {}
        self.asked: list[str] = []
        self.dies = False

        def answer_batch(_: Predictor, batch: Mapping[str, Any], keys: Sequence[str], sampling: Any) -> list[str]:
            if self.dies and self.asked:
                raise KilledError
            assert len(batch["input_ids"]) == len(keys)
            self.asked.extend(keys)
            return [self.says[key] for key in keys]

        monkeypatch.setattr(Predictor, "answer_batch", answer_batch)

    def say(self, *answers: str) -> None:
        self.says = {str(number): answer for number, answer in enumerate(answers)}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """In place of the model's generation."""
    return Stub(monkeypatch)


@pytest.fixture
def folder(data_folder: Path, tmp_path: Path) -> Path:
    """Images 0.png to 7.png, also in `images`, and the three benchmarks' files."""
    folder = tmp_path / "benchmarks"
    shutil.copytree(data_folder, folder)
    shutil.copytree(data_folder, folder / "images")
    lines = [f"{n // 2}.png\tIs it {'here' * (1 + n)}?\t{'No' if n % 2 else 'Yes'}\n" for n in range(6)]
    (folder / "existence.txt").write_text("".join(lines))
    pope = [
        {"question_id": n, "image": f"{n}.png", "text": f"Is there {n}?", "kind": "pope", "answer": right}
        for n, right in enumerate(["yes", "yes", "yes", "yes", "no", "no", "no"])
    ]
    (folder / "coco_pope.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pope))
    people = [
        ["red"] * 2 + ["blue"] * 8,
        ["two"] * 3 + ["one"] * 7,
        ["cat"] + ["dog"] * 9,
        ["a"] * 10,
        ["a"] * 4 + ["b"] * 6,
    ]
    vqa = [
        {"id": n, "image": f"{n}.png", "question": "What?", "answers": own, "type": "number" if n == 1 else "other"}
        for n, own in enumerate(people)
    ]
    (folder / "vqa.json").write_text(json.dumps({"questions": vqa, "all_ids": [0, 1, 2, 3, 4, 99]}))
    return folder


def ask(run: Path, task: Task, folder: Path, output: Path, stub: Stub) -> Evaluation:
    """Two processes; the first is killed after a batch, and started again when the second has found work left."""

    def process(index: int) -> Evaluation | None:
        shard = Shard(index, 2)
        return evaluate(run, task, folder, output=output, batch_size=1, max_new_tokens=4, device="cpu", shard=shard)

    stub.asked, stub.dies = [], True
    with pytest.raises(KilledError):
        process(0)
    stub.dies = False
    assert process(1) is None
    assert not (output / "metrics.json").exists()
    evaluation = process(0)
    assert evaluation is not None
    # Nothing was asked twice, and nothing left out.
    assert sorted(stub.asked) == sorted(stub.says)
    return evaluation


def test_pairs_of_questions(run: Path, folder: Path, tmp_path: Path, stub: Stub) -> None:
    stub.say("Yes", "No, it is not", "yes.", "Yes", "no", "unsure")
    evaluation = ask(run, MmeLike(), folder, tmp_path / "out", stub)

    # Right are both of image 0, one of image 1 and none of image 2.
    expected = {"accuracy": 3 / 6, "accuracy_plus": 1 / 3, "score": 50 + 100 / 3}
    assert evaluation.kinds["mme"].scores == pytest.approx(expected)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["kinds"]["mme"] == pytest.approx({"num_questions": 6} | expected)
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert rows[0]["prompt"] == "Is it here? Please answer yes or no."


def test_f1(run: Path, folder: Path, tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(TASKS._entries, "pope", PopeLike)
    stub.say("Yes.", "yes", "no", "No.", "yes, one", "no", "hm")
    evaluation = ask(run, PopeLike(), folder, tmp_path / "out", stub)

    # Of 4 that are yes 2 are said so, as is 1 of 3 that are no; "hm" is no answer, yet no yes either.
    expected = {"accuracy": 3 / 7, "precision": 2 / 3, "recall": 2 / 4, "f1": 4 / 7, "yes_ratio": 3 / 7}
    assert evaluation.kinds["pope"].scores == pytest.approx(expected)

    # The same through the command, from the answers that are there.
    stub.asked = []
    command = ["--task", "pope", "--image-folder", str(folder), "--output", str(tmp_path / "out")]
    assert main(["--model", str(run), *command, "--max-new-tokens", "4", "--device", "cpu"]) == 0
    assert stub.asked == []
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split(maxsplit=4) == [
        "pope",
        "7",
        "42.9",
        "%",
        "precision 0.667, recall 0.500, f1 0.571, yes_ratio 0.429",
    ]
    predictions = str(tmp_path / "out" / "predictions.jsonl")
    assert main(["--predictions", predictions, *command[:4]]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_ten_answers_and_a_server(run: Path, folder: Path, tmp_path: Path, stub: Stub) -> None:
    stub.say("red", "Two", "cat", "b", "a")
    evaluation = ask(run, VqaLike(), folder, tmp_path / "out", stub)

    # Two of ten: 2 x 1/3 + 8 x 2/3 = 6. Three: 3 x 2/3 + 7 = 9. One: 9 x 1/3 = 3. None: 0. Four: 10.
    assert [answer.scores["accuracy"] for answer in evaluation.answers] == pytest.approx([0.6, 0.9, 0.3, 0, 1])
    assert evaluation.kinds["vqa"].scores == pytest.approx({"accuracy": 2.8 / 5, "number": 0.9, "other": 1.9 / 4})
    sent = json.loads((tmp_path / "out" / "submission" / "vqa" / "vqav2_test.json").read_text())
    assert [row["answer"] for row in sent] == ["red", "two", "cat", "b", "a", ""]
    assert sent[-1]["question_id"] == 99


class ServerScored(Task):
    """Nobody here knows the answers."""

    def load(self, folder: str | Path) -> list[Question]:
        return [
            Question("a", (), "What is one?", "secret"),
            Question("b", ("0.png", "1.png"), "What differs?", "secret"),
        ]

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        return {}

    def submission(self, predictions: Sequence[ScoredAnswer]) -> Mapping[str, bytes]:
        return {"a.txt": "\n".join(own.prediction for own in predictions).encode()}


def test_questions_without_answers_without_images_and_with_several(
    run: Path, folder: Path, tmp_path: Path, stub: Stub, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS._entries, "secret", ServerScored)
    stub.says = {"a": "a number", "b": "nothing"}
    command = ["--model", str(run), "--task", "secret", "--image-folder", str(folder), "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0

    assert capsys.readouterr().out.splitlines() == ["kind         questions  accuracy", "secret               2"]
    assert (tmp_path / "out" / "submission" / "secret" / "a.txt").read_text() == "a number\nnothing"
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {
        "kinds": {"secret": {"num_questions": 2}},
        "num_questions": 2,
        "protocol": "llava",
    }


def test_a_task_asks_a_model_that_is_not_ours(folder: Path) -> None:
    task = VqaLike()
    asked = task.load(folder)
    rows = predict(asked, folder, lambda images, prompts: ["a"] * len(prompts), batch_size=2, task=task)
    assert score_predictions(asked, rows, task=task).kinds["vqa"].accuracy == pytest.approx(2 / 5)


def test_a_task_reads_its_own_questions_of_a_folder(folder: Path, run: Path, tmp_path: Path, stub: Stub) -> None:
    kinds = ["color", "shape", "color", "color"]
    rows = [
        {"question_id": n, "image": f"{n}.png", "text": "?", "kind": kind, "answer": "red"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    asked = ColorTask().load(folder)
    assert asked == [Question(n, f"images/{n}.png", "?", "color", "red") for n in (0, 2, 3)]
    stub.says = {"0": "red", "2": "blue", "3": "Red."}
    assert ask(run, ColorTask(), folder, tmp_path / "out", stub).kinds["color"].accuracy == 2 / 3
    with pytest.raises(ValueError, match=r"test\.jsonl has no question for OcrTask; look at its 'kind'"):
        TASKS.get("ocr")().load(folder)
    with pytest.raises(FileNotFoundError, match=r"questions\.jsonl does not exist"):
        TASKS.get("yes_no")().load(folder)


def test_an_installed_package_brings_a_task(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = metadata.EntryPoint("pope", f"{__name__}:PopeLike", "layerfuse.tasks")
    monkeypatch.setattr(TASKS, "_outside", {"pope": point})
    # Under the name of one of ours, which is taken out first: ours would go before it.
    monkeypatch.setattr(TASKS, "_entries", {name: kind for name, kind in TASKS._entries.items() if name != "pope"})
    assert TASKS.group == point.group

    asked = read_questions(folder / "coco_pope.jsonl")
    assert isinstance(TASKS.get(asked[0].kind)(), PopeLike)
    rows = [{"question_id": own.question_id, "prediction": "yes"} for own in asked]
    assert score_predictions(asked, rows).kinds["pope"].scores["f1"] == pytest.approx(8 / 11)


class Repeats(ServerScored):
    """Ids that cannot be told apart."""

    def load(self, folder: str | Path) -> list[Question]:
        return [Question(1, (), "?", "x"), Question("1", (), "?", "x")]


class Empty(ServerScored):
    """No questions."""

    def load(self, folder: str | Path) -> list[Question]:
        return []


@pytest.mark.parametrize(
    ("task", "message"),
    [(Repeats(), "task Repeats uses these ids more than once: 1"), (Empty(), "task Empty holds no question")],
)
def test_a_task_that_loads_nothing_or_ids_twice_is_refused(task: Task, message: str, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(run, task, tmp_path)


def test_several_processes_need_an_output(run: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="2 processes have no place to put their answers together; give an output"):
        evaluate(run, MmeLike(), folder, shard=Shard(0, 2))


def test_a_process_whose_questions_are_done_says_that_others_are_not(
    run: Path, folder: Path, tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(TASKS._entries, "mme", MmeLike)
    stub.say(*["yes"] * 6)
    command = ["--model", str(run), "--task", "mme", "--image-folder", str(folder), "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "out"), "--shard", "0/2"]) == 0
    assert capsys.readouterr().out == "other processes have questions left; the last one scores\n"
    assert main([*command, "--output", str(tmp_path / "out"), "--shard", "1/2"]) == 0
    assert "accuracy_plus 0.000" in capsys.readouterr().out


def test_the_command_wants_a_folder_for_a_task(run: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(run), "--task", "color"])
    assert "give it as --image-folder FOLDER" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(run), "--task", "colour", "--image-folder", "."])
    assert "question kind 'colour' is unknown; did you mean 'color'?" in capsys.readouterr().err


def test_predictions_that_version_0_1_wrote_are_scored_again(tmp_path: Path) -> None:
    rows = [
        {"question_id": 0, "image": "0.png", "text": "What color is it?", "kind": "color", "answer": "red"},
        {"question_id": 1, "image": "0.png", "text": "Where is it?", "kind": "box", "answer": [0.0, 0.0, 0.5, 0.5]},
    ]
    said = [
        {"prediction": "Red.", "scores": {"accuracy": 1.0}},
        {"prediction": "[0, 0, 0.25, 0.5]", "scores": {"accuracy": 0.0, "iou": 0.5}},
    ]
    questions, predictions = tmp_path / "test.jsonl", tmp_path / "predictions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    predictions.write_text("".join(json.dumps({**row, **own}) + "\n" for row, own in zip(rows, said, strict=True)))

    evaluation = score_predictions(read_questions(questions), read_predictions(predictions))
    assert [dict(answer.scores) for answer in evaluation.answers] == [own["scores"] for own in said]
    written = [json.dumps(answer.row()) for answer in evaluation.answers]
    assert "\n".join(written) + "\n" == predictions.read_text()
    assert evaluation.metrics()["mean_accuracy"] == 0.5
