"""The paper's benchmarks end to end, without a model: loaded in their layout, prompted, scored, summed up, sent."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.evaluation import (
    TASKS,
    Evaluation,
    Task,
    check_images,
    evaluate,
    predict,
    read_predictions,
    read_questions,
    score_predictions,
)
from integrations.llava.evaluation.tasks.paper import ReferringTask, VqaV2Task

from .paper_fixtures import (
    LETTER,
    MME_COGNITION,
    MME_PERCEPTION,
    SHORT,
    UNANSWERABLE,
    WRITERS,
    refcoco_rows,
    write_all,
    write_refcoco,
)

REFERRING = tuple(name for name in TASKS if name.startswith("refcoco") and issubclass(TASKS.get(name), ReferringTask))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eval")
    write_all(folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(written, tmp_path / "eval"))


@pytest.fixture
def referring(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """RefCOCO's files, or their rows where pyarrow, which reads them, is not installed."""
    if find_spec("pyarrow") is None:
        module = sys.modules["integrations.llava.evaluation.tasks.paper.refcoco"]
        monkeypatch.setattr(module, "parquet_rows", lambda *_: iter(refcoco_rows()))
    else:
        write_refcoco(folder)
    return folder


def asked(task: Task, folder: Path) -> list[str]:
    """Prompts, by way of the loop that asks models which are not ours: images are opened, too."""
    prompts: dict[str, str] = {}
    questions = task.load(folder)

    def answer(images: Any, texts: Any) -> list[str]:
        assert all(image.mode == "RGB" for image in images)
        return list(texts)

    for row in predict(questions, folder, answer, task=task, batch_size=4):
        prompts[str(row["question_id"])] = row["prediction"]
    return [prompts[str(own.question_id)] for own in questions]


def evaluated(task: Task, folder: Path, said: Mapping[Any, str]) -> Evaluation:
    questions = task.load(folder)
    check_images(questions, folder)
    (kind,) = {own.kind for own in questions}
    assert type(task) is TASKS.get(kind)
    rows = [{"question_id": own_id, "prediction": text} for own_id, text in said.items()]
    return score_predictions(questions, rows, task=task)


def numbers(evaluation: Evaluation) -> Mapping[str, float]:
    (kind,) = evaluation.kinds.values()
    return kind.scores


def each(evaluation: Evaluation) -> list[float]:
    return [own.scores["accuracy"] for own in evaluation.answers]


def sent(evaluation: Evaluation) -> dict[str, Any]:
    (files,) = evaluation.submissions.values()
    return {name: json.loads(content) for name, content in files.items()}


@pytest.mark.parametrize("name", [*WRITERS, *REFERRING])
def test_a_task_says_what_it_is_and_what_it_reads(name: str, written: Path) -> None:
    kind = TASKS.get(name)
    assert kind.protocols == ("llava", "lmms")
    assert kind.group in ("general", "ocrbench", "comprehension")
    assert kind.title
    assert kind.source
    for protocol in kind.protocols:
        task = kind(protocol)
        assert task.max_new_tokens is not None
        for own in task.needs() if name in WRITERS else ():
            assert list(written.glob(own.path)), own
            assert own.what
            assert own.source
        doc = kind.__doc__ or ""
        assert "Example:" in doc or issubclass(kind, ReferringTask)


@pytest.mark.parametrize("name", [*WRITERS, *REFERRING])
def test_a_missing_file_is_told_with_the_place_to_get_it(name: str, tmp_path: Path) -> None:
    task = TASKS.get(name)()
    first = task.needs()[0]
    with pytest.raises(FileNotFoundError) as error:
        task.load(tmp_path)
    assert first.path in str(error.value)
    assert first.source in str(error.value)


def test_vqav2_sends_all_ids_of_the_whole_test_set(folder: Path) -> None:
    evaluation = evaluated(VqaV2Task(), folder, {262144000: "A dog", 262144002: "Two."})
    assert numbers(evaluation) == {}
    answers = {262144000: "dog", 262144001: "", 262144002: "2", 262144003: ""}
    rows = [{"question_id": own_id, "answer": text} for own_id, text in answers.items()]
    assert sent(evaluation) == {"vqav2_test-dev2015.json": rows}
    assert asked(VqaV2Task(), folder) == [f"What is {own}?{SHORT}" for own in (262144002, 262144000)]


def test_vizwiz_sends_every_image(folder: Path) -> None:
    said = {"VizWiz_test_00000001.jpg": "Blue.", "VizWiz_test_00000000.jpg": "Unanswerable"}
    evaluation = evaluated(TASKS.get("vizwiz")(), folder, said)
    assert numbers(evaluation) == {}
    names = [("VizWiz_test_00000000.jpg", "unanswerable"), ("VizWiz_test_00000001.jpg", "blue")]
    assert sent(evaluation) == {"vizwiz_test.json": [{"image": name, "answer": text} for name, text in names]}
    suffix = UNANSWERABLE + SHORT
    assert asked(TASKS.get("vizwiz")(), folder) == ["WHAT is this?" + suffix, "what color?" + suffix]
    assert asked(TASKS.get("vizwiz")("lmms"), folder) == ["What is this?" + suffix, "What color?" + suffix]


def test_gqa(folder: Path) -> None:
    said = {"201": "No!", "202": "A girl", "203": "T-shirt."}
    evaluation = evaluated(TASKS.get("gqa")(), folder, said)
    # "no!" and "a girl" are other texts than "no" and "girl"; one of two open questions is right.
    assert numbers(evaluation) == pytest.approx({"accuracy": 1 / 3, "binary": 0, "open": 1 / 2})
    rows = sent(evaluation)["testdev_balanced_predictions.json"]
    assert rows[2] == {"questionId": "203", "prediction": "t-shirt"}
    assert len(rows) == 3
    assert each(evaluated(TASKS.get("gqa")("lmms"), folder, said)) == [1, 0, 1]
    assert asked(TASKS.get("gqa")(), folder)[1] == f"Who is it?{SHORT}"


def test_scienceqa(folder: Path) -> None:
    said = {"4": "B", "5": "A.", "6": "The answer is A."}
    evaluation = evaluated(TASKS.get("scienceqa")(), folder, said)
    assert each(evaluation) == [1, 0, 1]
    assert numbers(evaluation) == pytest.approx({"accuracy": 2 / 3})
    assert each(evaluated(TASKS.get("scienceqa")("lmms"), folder, said)) == [1, 1, 0]
    options = "Options: (A) 1 (B) 2 (C) 3"
    assert asked(TASKS.get("scienceqa")(), folder)[1] == f"Context: See it.\nQuestion: How many?\n{options}{LETTER}"
    prompts = asked(TASKS.get("scienceqa")("lmms"), folder)
    assert prompts[0] == f"Which bird?\nA. gull\nB. owl{LETTER}"
    assert prompts[1] == f"Context: See it.\nHow many?\nA. 1\nB. 2\nC. 3{LETTER}"


def test_textvqa(folder: Path) -> None:
    evaluation = evaluated(TASKS.get("textvqa")(), folder, {34602: "Dakota", 34603: "3:45", 34604: "Yes."})
    # Four of ten are enough; three give 3 x 2/3 + 7 x 1 of ten.
    assert each(evaluation) == pytest.approx([1, 0.9, 1])
    assert numbers(evaluation)["accuracy"] == pytest.approx(2.9 / 3)
    tokens = "\nReference OCR token: DAKOTA, DIGITAL"
    assert asked(TASKS.get("textvqa")(), folder)[:2] == [f"what is the Brand?{tokens}{SHORT}", f"What time?{SHORT}"]
    assert asked(TASKS.get("textvqa")("lmms"), folder)[0] == f"What is the brand?{SHORT}"


def test_a_question_of_textvqa_that_comes_again_gets_an_id_of_its_own(folder: Path) -> None:
    path = folder / "textvqa/llava_textvqa_val_v051_ocr.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[0]]))
    assert [own.question_id for own in TASKS.get("textvqa")().load(folder)] == [34602, 34603, 34604, "34602#2"]


POPE_SAID = dict(enumerate(["Yes", "Yes", "No", "no.", "Yes", "No", "yes", "No", "No", "No", "No", "No"]))


def test_pope_averages_the_f1_of_three_categories(folder: Path) -> None:
    scores = numbers(evaluated(TASKS.get("pope")(), folder, POPE_SAID))
    # Adversarial: one of each count. Popular: all right. Random: never yes, whose F1 is 0.
    assert {name: scores[f"{name}_f1"] for name in ("adversarial", "popular", "random")} == {
        "adversarial": 0.5,
        "popular": 1.0,
        "random": 0.0,
    }
    means = {"f1": 0.5, "accuracy": 2 / 3, "precision": 0.5, "recall": 0.5, "yes_ratio": 1 / 3}
    assert {name: scores[name] for name in means} == pytest.approx(means)
    assert TASKS.get("pope").metric == "f1"


def test_pope_as_lmms_eval_pools_it(folder: Path) -> None:
    # "no." is neither; 3 of 4 yes are right, of 6 that are yes 3 are said so; half of the labels are yes.
    expected = {"f1": 0.6, "accuracy": 7 / 12, "precision": 3 / 4, "recall": 1 / 2, "yes_ratio": 1 / 2}
    assert numbers(evaluated(TASKS.get("pope")("lmms"), folder, POPE_SAID)) == pytest.approx(expected)


def test_mme_counts_images_both_of_whose_questions_are_right(folder: Path) -> None:
    task = TASKS.get("mme")()
    questions = task.load(folder)
    said = {own.question_id: own.answer.capitalize() for own in questions}
    said |= {"count/0001.jpg#2": "Yes, it is", "existence/0000.jpg#2": "N", "code_reasoning/0000.jpg#2": "Unsure yes"}
    scores = numbers(evaluated(task, folder, said))
    # count: 3 of 4 questions and 1 of 2 images; the other two: 1 of 2 and none.
    expected = dict.fromkeys((*MME_PERCEPTION, *MME_COGNITION), 200.0)
    expected |= {"count": 125.0, "existence": 50.0, "code_reasoning": 50.0}
    sums = {"perception": 8 * 200.0 + 125 + 50, "cognition": 3 * 200.0 + 50}
    assert scores == pytest.approx(sums | expected)
    assert numbers(evaluated(TASKS.get("mme")("lmms"), folder, said))["existence"] == 200.0
    assert [task.unit(own) for own in questions[:2]] == ["existence/0000.jpg"] * 2
    assert len({task.unit(own) for own in questions}) == len(questions) / 2
    assert (task.metric, task.shown_as) == ("perception", "points")
    assert asked(task, folder)[0] == f"Is it 0000?{SHORT}"


def test_ocrbench_adds_up_categories(folder: Path) -> None:
    said = {number + 1: f"It says\nword {number}." for number in range(10)} | {8: "nothing", 10: "so A\\frac{1} it is"}
    scores = numbers(evaluated(TASKS.get("ocrbench")(), folder, said))
    parts = {"recognition": 6, "scene_vqa": 1, "document_vqa": 0, "key_information": 1, "handwritten_mathematics": 1}
    assert {name: scores[name] for name in ("score", *parts)} == {"score": 9, **parts}
    assert scores["Digit String Recognition"] == 1
    assert numbers(evaluated(TASKS.get("ocrbench")("lmms"), folder, said))["score"] == 9
    assert asked(TASKS.get("ocrbench")(), folder)[0] == "what is written 0? "
    assert asked(TASKS.get("ocrbench")("lmms"), folder)[0] == "what is written 0?"


def test_ocrbench_as_lines(folder: Path) -> None:
    path = folder / "OCRBench/OCRBench.json"
    rows = json.loads(path.read_text())
    path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.unlink()
    assert len(TASKS.get("ocrbench")().load(folder)) == 10


def test_referring_expressions_in_both_frames(referring: Path) -> None:
    said = {
        "0.0": "[0.1, 0, 0.5, 0.3]",  # the man, in fractions of the image
        "0.1": "It is at [0.1, 0.25, 0.5, 0.4].",  # the same box in the square around the image
        "1.0": "[0.0, 0.0, 0.5, 0.5]",  # half of the right box, which is enough; a square is its own frame
    }
    task = TASKS.get("refcoco_val")()
    evaluation = evaluated(task, referring, said)
    assert each(evaluation) == [1, 0, 1]
    rates = {"accuracy": 2 / 3, "original": 2 / 3, "padded": 2 / 3}
    assert {name: numbers(evaluation)[name] for name in rates} == pytest.approx(rates)
    kind = TASKS.get("refcoco_val")
    assert issubclass(kind, ReferringTask)
    assert each(evaluated(kind(frame="padded"), referring, said)) == [0, 1, 1]
    assert each(evaluated(kind(frame="padded"), referring, dict.fromkeys(said, "I see it."))) == [0, 0, 0]
    assert asked(task, referring)[1].endswith("the region this sentence describes: left one")
    stored = {own.images for own in task.load(referring)}
    assert len(stored) == 2
    with pytest.raises(ValueError, match="frame 'square' is unknown; give original or padded"):
        kind(frame="square")  # type: ignore[arg-type]


def test_the_names_of_referring_tasks_are_those_that_they_are_registered_by() -> None:
    assert len(REFERRING) == 8
    for name in REFERRING:
        task = TASKS.get(name)()
        assert isinstance(task, ReferringTask)
        assert task.name == name


@pytest.mark.parametrize("name", ["gqa", "mme"])
def test_a_model_is_asked_a_benchmark(name: str, folder: Path, run: Path, tmp_path: Path) -> None:
    task = TASKS.get(name)()
    output = tmp_path / "out"
    evaluation = evaluate(run, task, folder, output=output, max_new_tokens=2, device="cpu")
    assert evaluation is not None
    assert task.metric in numbers(evaluation)
    assert len(evaluation.answers) == len(task.load(folder))
    given = read_predictions(output / "predictions.jsonl")
    assert score_predictions(task.load(folder), given, task=task).kinds == evaluation.kinds


@pytest.mark.parametrize("name", [*WRITERS, *REFERRING])
def test_a_benchmark_takes_no_question_of_ones_own(name: str, tmp_path: Path) -> None:
    row = {"question_id": 1, "image": "a.png", "text": "?", "kind": name, "answer": "yes"}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="is a benchmark, whose questions are read from its own files"):
        read_questions(path)


@pytest.mark.parametrize("name", WRITERS)
def test_short_and_doubled_predictions_are_counted_and_listed(name: str, folder: Path) -> None:
    task = TASKS.get(name)()
    ids = [own.question_id for own in task.load(folder)]
    rows = [{"question_id": own_id, "prediction": "yes"} for own_id in ids]
    with pytest.raises(ValueError, match=r"question ids, \d+ missing: .*; \d+ given more than once: "):
        score_predictions(task.load(folder), [*rows[1:], rows[1]], task=task)
