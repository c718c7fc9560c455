"""Metrics against recorded runs of the published scorers: all cases, files and arguments come from the folder.

A run that failed there is compared up to where it failed; what ours says instead is asserted beside.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.evaluation.metrics.binary import YesNoCounts, read_pope_answer
from integrations.llava.evaluation.metrics.grounding import Box, decode_grounding_answer, grounding_overlap
from integrations.llava.evaluation.metrics.ocrbench import CATEGORIES, ocrbench_sums, stands_in_answer
from integrations.llava.evaluation.metrics.science_qa import read_science_qa_answer
from integrations.llava.evaluation.metrics.vqa import normalise_vqa_answer, soft_vqa_score
from integrations.llava.evaluation.tasks.paper.textvqa import question_in_prompt
from layerfuse.errors import InputError
from tests.goldens_support import SHARED


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


FOLDER = SHARED / "metrics"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="goldens not found; set LAYERFUSE_GOLDENS to their folder")
EXPECTED: dict[str, list[dict[str, Any]]] = read(FOLDER / "expected.json") if FOLDER.is_dir() else {}
Run = Callable[[Path, dict[str, str], dict[str, Any]], None]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def options_of(arguments: list[str]) -> dict[str, str]:
    """``--key value`` pairs; a flag has an empty value."""
    options: dict[str, str] = {}
    for index, word in enumerate(arguments):
        if word.startswith("--"):
            value = arguments[index + 1] if index + 1 < len(arguments) else "--"
            options[word[2:]] = "" if value.startswith("--") else value
    return options


@pytest.mark.parametrize(
    ("tool", "index"), [(tool, index) for tool, cases in EXPECTED.items() for index in range(len(cases))]
)
def test_a_recorded_run_gives_its_numbers(tool: str, index: int) -> None:
    case = EXPECTED[tool][index]
    RUNS[tool](FOLDER / tool, options_of(case["args"]), case)


def test_every_tool_of_goldens_is_compared() -> None:
    assert EXPECTED.keys() == RUNS.keys()
    assert all(EXPECTED.values())


# POPE


def run_pope(folder: Path, options: dict[str, str], case: dict[str, Any]) -> None:
    questions = {row["question_id"]: row for row in lines(folder / options["question-file"])}
    answers = lines(folder / options["result-file"])
    recorded = dict(pope_blocks(case["stdout"]))
    files = sorted((folder / options["annotation-dir"]).glob("coco_pope_*.json"))
    ours = {}
    for path in files:
        category = path.stem.removeprefix("coco_pope_")
        said = [row["text"] for row in answers if questions[row["question_id"]]["category"] == category]
        # Short files are cut: the published scorer pairs by position.
        pairs = zip(map(read_pope_answer, said), (row["label"] != "no" for row in lines(path)), strict=False)
        ours[category] = (said, YesNoCounts.of(pairs))
    if case["returncode"] == 0:
        assert recorded.keys() == ours.keys()
    for category, block in recorded.items():
        said, counts = ours[category]
        assert block[0] == str(len(said))
        if len(block) == 1:  # no answer to divide by
            assert not said
            continue
        # The published share is that of all answers, paired or not.
        yes_ratio = sum(map(read_pope_answer, said)) / len(said)
        assert counts.total < len(said) or yes_ratio == counts.yes_ratio
        found = (counts.true_positives, counts.false_positives, counts.true_negatives, counts.false_negatives)
        assert block[1:5] == [str(count) for count in found]
        numbers = [counts.accuracy, counts.precision, counts.recall, counts.f1, yes_ratio]
        short = [counts.f1, counts.accuracy, counts.precision, counts.recall, yes_ratio]
        if len(block) > 5:
            assert block[5:] == [*map(str, numbers), *(f"{number:.3f}" for number in short)]
        else:
            assert "ZeroDivisionError" in case["error"]
            assert (counts.f1, *numbers[:1]) == (0.0, (found[0] + found[2]) / sum(found))


def pope_blocks(stdout: str) -> Iterator[tuple[str, list[str]]]:
    """Category, and all numbers of its block as they were printed."""
    for block in stdout.split("Category: ")[1:]:
        category, _, rest = block.partition(", # samples: ")
        yield category, re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?(?![\w.])", rest)


# Referring expressions


def run_grounding(folder: Path, options: dict[str, str], case: dict[str, Any]) -> None:
    questions = {row["question_id"]: row for row in lines(folder / options["question-file"])}
    hits = defaultdict(list)
    unread = []
    for row in lines(folder / options["result-file"]):
        question = questions[row["question_id"]]
        box = decode(row["text"], question, "square-pad-postprocess" in options, float(options.get("bbox-scale", 999)))
        overlap = grounding_overlap(box, question["bbox"])
        hits[question["category"]].append(overlap > 0.5)
        if box[:2] == box[2:]:
            unread.append(overlap)
    recorded = re.findall(r"Category: (.*), # samples: (\d+), # Acc@0\.5: ([\d.]+)", case["stdout"])
    ours = [(name, str(len(own)), f"{sum(own) / len(own) * 100:.2f}") for name, own in hits.items()]
    if case["returncode"] == 0:
        assert sorted(recorded) == sorted(ours)
    else:
        # Eight numbers in one pair of brackets end the published scorer; here they are no box, and a wrong answer.
        assert "RuntimeError" in case["error"]
        assert not recorded
        assert unread
        assert not any(unread)


def decode(text: str, question: dict[str, Any], square_pad: bool, scale: float = 999) -> Box:
    return decode_grounding_answer(text, question["width"], question["height"], scale=scale, square_pad=square_pad)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("grounding/per_item*.json")), ids=lambda path: path.stem)
def test_boxes_of_goldens_one_by_one(path: Path) -> None:
    questions = {row["question_id"]: row for row in lines(path.with_name("questions.jsonl"))}
    answers = {row["question_id"]: row["text"] for row in lines(path.with_name("answers.jsonl"))}
    rows = read(path)
    assert rows
    for row in rows:
        question = questions[row["question_id"]]
        for square_pad, recorded in ((True, row["square_pad"]), (False, row["direct"])):
            box = decode(answers[row["question_id"]], question, square_pad)
            overlap = grounding_overlap(box, question["bbox"])
            assert box == pytest.approx(recorded["pred_box"], abs=6e-5)
            assert (round(overlap, 6), overlap > 0.5) == (pytest.approx(recorded["iou"], abs=1e-6), recorded["hit"])


# TextVQA


def run_textvqa(folder: Path, options: dict[str, str], case: dict[str, Any]) -> None:
    annotations = read(folder / options["annotation-file"])["data"]
    people = {(row["image_id"], row["question"].lower()): row["answers"] for row in annotations}
    printed = ""
    several = sorted((folder / options["result-dir"]).iterdir()) if "result-dir" in options else []
    for path in several or [folder / options["result-file"]]:
        if path.suffix != ".jsonl":
            printed += f"Skipping {path.name}\n"
            continue
        printed += f"{path.stem}\n"
        rows = lines(path)
        try:
            questions = [question_in_prompt(row["prompt"]) for row in rows]
        except InputError:
            assert "AssertionError" in case["error"]
            assert printed == case["stdout"]
            return
        answers = [(row["text"], people[row["question_id"], own]) for row, own in zip(rows, questions, strict=True)]
        score = sum(soft_vqa_score(text, own) for text, own in answers) / len(answers)
        printed += f"Samples: {len(answers)}\nAccuracy: {100 * score:.2f}%\n\n"
    assert (printed, 0) == (case["stdout"], case["returncode"])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("textvqa/per_item*.json")), ids=lambda path: path.stem)
def test_soft_scores_of_goldens_one_by_one(path: Path) -> None:
    annotations = read(path.with_name("annotations.json"))["data"]
    people = {(row["image_id"], row["question"].lower()): row["answers"] for row in annotations}
    answers = lines(path.with_name("answers.jsonl"))
    rows = read(path)
    assert len(rows) == len(answers) > 0
    for row, answer in zip(rows, answers, strict=True):
        question = question_in_prompt(answer["prompt"])
        assert (answer["question_id"], question) == (row["question_id"], row["question_read"])
        own = people[row["question_id"], question]
        assert normalise_vqa_answer(answer["text"]) == row["normalised_prediction"]
        soft = {normalise_vqa_answer(one): soft_vqa_score(one, own) for one in own}
        assert soft == pytest.approx(row["soft_scores"])
        assert soft_vqa_score(answer["text"], own) == pytest.approx(row["score"])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("textvqa/normaliser*.json")), ids=lambda path: path.stem)
def test_answers_of_goldens_are_normalised_as_recorded(path: Path) -> None:
    vectors = read(path)
    assert vectors
    assert [normalise_vqa_answer(own["text"]) for own in vectors] == [own["normalised"] for own in vectors]


# ScienceQA


def run_scienceqa(folder: Path, options: dict[str, str], case: dict[str, Any]) -> None:
    base = folder / options["base-dir"]
    split = read(base / "pid_splits.json")[options.get("split", "test")]
    problems = read(base / "problems.json")
    # A missing answer is one that cannot be read, to a question without image.
    answers = {row["question_id"]: row for row in lines(folder / options["result-file"])}
    indices, rights, shown = {}, {}, {}
    for key in split:
        row = answers.get(key, {"text": "FAILED", "prompt": "Unknown"})
        letter = read_science_qa_answer(row["text"], len(problems[key]["choices"]))
        indices[key] = -1 if letter is None else "ABCDE".index(letter)
        rights[key] = indices[key] == problems[key]["answer"]
        shown[key] = "<image>" in row["prompt"]
    if not any(shown.values()):
        assert "ZeroDivisionError" in case["error"]
        return
    right, shown_right = sum(rights.values()), sum(rights[key] for key in split if shown[key])
    accuracy, shown_accuracy = right / len(split) * 100, shown_right / sum(shown.values()) * 100
    printed = f"Total: {len(split)}, Correct: {right}, Accuracy: {accuracy:.2f}%, IMG-Accuracy: {shown_accuracy:.2f}%\n"
    assert (printed, 0) == (case["stdout"], case["returncode"])
    result = read(folder / options["output-result"])
    assert (indices, accuracy) == (result["results"], result["acc"])
    analysis = read(folder / options["output-file"])
    assert {row["question_id"] for row in analysis["correct"]} == {key for key in split if rights[key]}
    each = [*analysis["correct"], *analysis["incorrect"]]
    assert {row["question_id"]: row["is_multimodal"] for row in each} == shown


# OCRBench


def run_ocrbench(folder: Path, options: dict[str, str], case: dict[str, Any]) -> None:
    rows = lines(folder / options["src"])
    hits = [ocrbench_hit(row) for row in rows]
    if len(rows) == 1000:
        sums = ocrbench_sums((row["type"], hit) for row, hit in zip(rows, hits, strict=True))
        recorded = re.findall(r"(.+)\(Total \d+\): ?(\d+)", case["stdout"])
        printed = {name.strip(): float(number) for name, number in recorded}
        names = {"Final Score": "score", "Text Recognition": "recognition"}
        assert {name: sums[names.get(name, name)] for name in printed} == printed
        assert len(printed) == 2 + sum(map(len, CATEGORIES.values()))
        return
    by_dataset: dict[str, list[int]] = defaultdict(list)
    for row, hit in zip(rows, hits, strict=True):
        by_dataset[row["dataset_name"]].append(hit)
    shares = dict(line.split(": ") for line in case["stdout"].splitlines())
    assert shares == {name: str(sum(by_dataset[name]) / len(by_dataset[name])) for name in shares}
    if case["returncode"] == 0:
        assert shares.keys() == by_dataset.keys()
    else:
        assert "ZeroDivisionError" in case["error"]


def ocrbench_hit(row: dict[str, Any]) -> int:
    answers = row["answers"] if isinstance(row["answers"], list) else [row["answers"]]
    return int("text" in row and stands_in_answer(row["text"], answers, row["dataset_name"]))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("ocrbench/per_item*.json")), ids=lambda path: path.stem)
def test_hits_of_goldens_one_by_one(path: Path) -> None:
    rows = lines(path.with_name(path.name.replace("per_item", "answers") + "l"))
    assert [ocrbench_hit(row) for row in rows] == read(path)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("pope/per_item*.json")), ids=lambda path: path.stem)
def test_yes_and_no_of_goldens_one_by_one(path: Path) -> None:
    rows = read(path)
    assert rows
    assert [read_pope_answer(row["text"]) for row in rows] == [row["read_as"] == "yes" for row in rows]


RUNS: dict[str, Run] = {
    "pope": run_pope,
    "grounding": run_grounding,
    "textvqa": run_textvqa,
    "scienceqa": run_scienceqa,
    "ocrbench": run_ocrbench,
}
