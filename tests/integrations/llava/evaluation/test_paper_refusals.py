"""Files of benchmarks that do not fit one another are refused, with counts and a list, before anything is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.evaluation import TASKS, Question, ScoredAnswer
from integrations.llava.evaluation.tasks.paper import ReferringTask
from integrations.llava.evaluation.tasks.paper.textvqa import question_in_prompt

from .paper_fixtures import WRITERS, refcoco_rows

Change = Callable[[Any], Any]


def change_lines(path: Path, change: Change) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def change_json(path: Path, change: Change) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def without(key: str) -> Change:
    return lambda content: {name: own for name, own in content.items() if name != key}


def moved(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[1], rows[0], *rows[2:]]


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        (
            "vqav2",
            "vqav2/llava_vqav2_mscoco_test2015.jsonl",
            lambda rows: rows[1:],
            r"1 of 2 .* not in .*; ids 262144000",
        ),
        ("gqa", "gqa/data/testdev_balanced_questions.json", without("202"), r"1 of 3 questions are not in .*; ids 202"),
        ("scienceqa", "scienceqa/problems.json", without("4"), "1 of 3 questions are not in .*; ids 4"),
        ("scienceqa", "scienceqa/llava_test_CQM-A.json", lambda rows: rows[3:], "holds no question with an image"),
        (
            "textvqa",
            "textvqa/TextVQA_0.5.1_val.json",
            lambda content: {"data": content["data"][:2]},
            "1 of 3 questions have no answers in .*: 0b 'is it open",
        ),
        (
            "pope",
            "pope/llava_pope_test.jsonl",
            lambda rows: rows[:8],
            "lacks or has more than the categories .*: random",
        ),
        (
            "pope",
            "pope/coco/coco_pope_random.json",
            lambda rows: rows[1:],
            "has 3 labels for 4 questions of category random",
        ),
        ("pope", "pope/coco/coco_pope_popular.json", moved, "other images .* in 2 of 4 lines, question ids 4, 5"),
        (
            "mme",
            "MME/llava_mme.jsonl",
            lambda rows: rows[1:],
            "1 of 15 images have other than 2 questions: existence/0000",
        ),
        ("mme", "MME/llava_mme.jsonl", lambda rows: rows[2:], "lacks, or has beside MME's, the sub-tasks existence"),
        ("ocrbench", "OCRBench/OCRBench.json", lambda rows: [], "holds no question; give the whole file"),
        (
            "ocrbench",
            "OCRBench/OCRBench.json",
            lambda rows: [{"question": "?"}],
            "question 1 lacks dataset_name, answers",
        ),
        (
            "ocrbench",
            "OCRBench/OCRBench.json",
            lambda rows: [rows[0] | {"type": "Reading"}],
            "question 1 is of type 'Reading', which OCRBench does not have",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(name: str, file: str, change: Change, message: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    (change_lines if file.endswith("jsonl") or "coco_pope" in file else change_json)(tmp_path / file, change)
    with pytest.raises(ValueError, match=message):
        TASKS.get(name)().load(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "Is it something else? Please answer yes or no.\tYes",
            "1 of 30 questions have no answer .*existence/0000.jpg 'Is",
        ),
        ("Is it 0000? Please answer yes or no. Yes", "line 1: expected a question, a tab, and Yes or No"),
    ],
)
def test_mme_without_an_answer(line: str, message: str, tmp_path: Path) -> None:
    WRITERS["mme"](tmp_path)
    path = tmp_path / "MME/MME_Benchmark_release_version/existence/0000.txt"
    path.write_text("\n".join([line, path.read_text().splitlines()[1]]))
    with pytest.raises(ValueError, match=message):
        TASKS.get("mme")().load(tmp_path)


def test_vqav2_sends_nothing_before_it_knows_all_ids() -> None:
    answers = [ScoredAnswer(Question(1, "a", "?", "vqav2"), "yes", {})]
    with pytest.raises(ValueError, match="ids of test2015 are not known; load the questions"):
        TASKS.get("vqav2")().submission(answers)


def test_a_referring_image_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = refcoco_rows()[:1]
    broken[0]["image"] = {"bytes": b"no picture", "path": None}
    monkeypatch.setattr(
        "integrations.llava.evaluation.tasks.paper.refcoco.parquet_rows", lambda *_: iter(broken), raising=True
    )
    task = TASKS.get("refcocog_test")()
    assert isinstance(task, ReferringTask)
    with pytest.raises(ValueError, match=r"RefCOCOg/data/test-\*\.parquet, row 0: the image cannot be read"):
        task.load(tmp_path)


def test_questions_are_found_in_prompts_of_every_known_form() -> None:
    short = "Answer the question using a single word or phrase."
    forms = [
        f"What IS it?\n{short}",
        f"What is it?\nReference OCR token: a\n{short}",
        f"Reference OCR token: a\nWhat is it?\n{short}",
        "OCR tokens: a. Question: What is it? Short answer:",
    ]
    assert {question_in_prompt(form) for form in forms} == {"what is it?"}
    for form in ["What is it?", f"What is it?\nOCR: a\n{short}", "OCR tokens: a. What is it?", "a\nb\nc\nd"]:
        with pytest.raises(ValueError, match="is of no form that TextVQA's scorer reads"):
            question_in_prompt(form)
