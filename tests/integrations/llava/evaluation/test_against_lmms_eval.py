"""The ``lmms`` protocol against lmms-eval's own functions, where it is installed (in an environment of its own)."""

from __future__ import annotations

import importlib
import random
from types import ModuleType

import pytest

from integrations.llava.evaluation import TASKS, Question
from integrations.llava.evaluation.metrics.binary import read_mme_answer
from integrations.llava.evaluation.metrics.boxes import intersection_over_union
from integrations.llava.evaluation.metrics.grounding import parse_float_box
from integrations.llava.evaluation.metrics.vqa import normalise_vqa_answer

WORDS = [
    "Yes",
    "no",
    "y",
    "N",
    "A",
    "b",
    "B.",
    "the answer is",
    "Dont",
    "two",
    "a",
    "1,000",
    "3.",
    ".5",
    "x-y",
    "!",
    "St. John's",
]
WORDS += [
    "[0.1, 0.2, 0.5, 0.9]",
    "[0,0,1,1]",
    "[ 0.25,0.3, 0.4,0.5 ]",
    "[1, 2]",
    "\n",
    "  ",
    "'s",
    "somebody'd",
    "/",
    "?",
]


def texts() -> list[str]:
    generator = random.Random(0)
    return ["", *WORDS, *("".join(generator.choices([*WORDS, " "], k=generator.randint(1, 6))) for _ in range(2000))]


def theirs(name: str) -> ModuleType:
    # Here and not above: a module that is skipped shows in every selection of tests.
    pytest.importorskip("lmms_eval")
    pytest.importorskip("datasets")
    return importlib.import_module(f"lmms_eval.tasks.{name}")


def test_short_answers_are_normalised_alike() -> None:
    processor = theirs("_task_utils.vqa_eval_metric").EvalAIAnswerProcessor()
    assert [normalise_vqa_answer(text) for text in texts()] == [processor(text) for text in texts()]


def test_yes_and_no_are_read_alike() -> None:
    parse = theirs("mme.utils").parse_pred_ans
    assert [read_mme_answer(text, lenient=True) for text in texts()] == [parse(text) for text in texts()]


def test_letters_are_scored_alike() -> None:
    process = theirs("scienceqa.utils").sqa_process_results
    document = {"choices": ["gull", "owl"], "answer": 1, "hint": "", "question": "Which bird?"}
    question = Question("4", "a.png", "?", "scienceqa", "B", document)
    task = TASKS.get("scienceqa")("lmms")
    ours = [task.score(text, question)["accuracy"] for text in texts()]
    assert ours == [process(document, [text])["exact_match"] for text in texts()]


def test_boxes_are_read_and_compared_alike() -> None:
    rec = theirs("refcoco.utils_rec")
    right = (0.2, 0.1, 0.6, 0.9)
    for text in texts():
        said = parse_float_box(text)
        assert list(said or (0, 0, 0, 0)) == rec.parse_float_sequence_within(text)
        if said is not None:
            assert intersection_over_union(said, right) == pytest.approx(rec.compute_iou(list(right), list(said)))


def test_texts_are_looked_for_alike() -> None:
    process = theirs("ocrbench.utils").ocrbench_process_results
    task = TASKS.get("ocrbench")("lmms")
    for dataset, answers in (("HME100k", ["A B"]), ("svt", ["Yes", "3."])):
        kind = "Regular Text Recognition"
        document = {"answer": answers, "dataset": dataset, "question_type": kind}
        question = Question(1, "a.png", "?", "ocrbench", tuple(answers), {"dataset_name": dataset, "type": kind})
        for text in texts():
            assert task.score(text, question)["accuracy"] == process(document, [text])["ocrbench_accuracy"]["score"]
