"""MME: two questions an image, one to be answered yes and one no, in fourteen sub-tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from integrations.llava._text import listed
from layerfuse.errors import InputError

from ...metrics.binary import mme_score, read_mme_answer
from ...published_files import read_llava_questions
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from .benchmark import BenchmarkTask
from .prompts import EVAL_ZIP, SHORT_ANSWER

__all__ = ["MmeTask"]

_ASKED = "MME/llava_mme.jsonl"
_DATA = "MME/MME_Benchmark_release_version"
_YES_OR_NO = "Please answer yes or no."
_PERCEPTION = (
    *("existence", "count", "position", "color", "posters"),
    *("celebrity", "scene", "landmark", "artwork", "OCR"),
)
_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


@TASKS.register("mme")
class MmeTask(BenchmarkTask):
    """Sub-task score: 100 x accuracy + 100 x share of images with both questions right; perception is their sum of ten.

    Perception (at most 2000) is the reported number, cognition (four sub-tasks, at most 800) stands beside it. An
    answer is read as the official tool does (`read_mme_answer`); ``lmms`` is a little more lenient.

    Example:
        ``Is there a refrigerator in this image?`` and the sentence that asks for a single word are answered ``Yes``.
    """

    title = "MME"
    source = "MME, eval_tool/calculation.py: perception"
    question_file = _ASKED
    metric = "perception"
    parts: ClassVar[Mapping[str, str]] = {"cognition": "cognition"}
    shown_as = "points"
    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 128, "lmms": 16}

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the questions, and the folder of images and answers."""
        where = "branch Evaluation of github.com/BradyFU/Awesome-Multimodal-Large-Language-Models"
        return (
            NeededFile(_ASKED, "questions", EVAL_ZIP),
            NeededFile(_DATA, "a folder per sub-task, of images and of texts with answers", where),
        )

    def load(self, folder: str | Path) -> list[Question]:
        """Read the questions, and their answers from the texts beside the images.

        Both questions of an image have one id in LLaVA's file; here they are numbered, ``existence/1.jpg#1`` and #2.

        Raises:
            ValueError: if an answer is missing, a sub-task is, or an image has other than two questions.
        """
        asked = read_llava_questions(self, "mme", folder, _ASKED, _DATA)
        images = Counter(own.question_id for own in asked)
        odd = [str(own_id) for own_id, count in images.items() if count != 2]
        if odd:
            raise InputError(
                f"{Path(folder) / _ASKED}: {len(odd)} of {len(images)} images have other than 2 questions: "
                f"{listed(odd, most=10)}. Give the whole file."
            )
        missing = {*_PERCEPTION, *_COGNITION}.symmetric_difference(map(_category, asked))
        if missing:
            raise InputError(
                f"{Path(folder) / _ASKED} lacks, or has beside MME's, the sub-tasks {', '.join(sorted(missing))}; "
                "give the whole file."
            )
        return _with_answers(asked, Path(folder) / _DATA)

    def unit(self, question: Question) -> Hashable:
        """Return the image: its two questions are one draw."""
        return question.fields["image_id"]

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score yes or no; anything else is wrong."""
        return {"accuracy": float(read_mme_answer(answer, lenient=self.protocol == "lmms") == question.answer)}

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Sum up perception and cognition; the score of each sub-task stands beside."""
        parts: dict[str, list[tuple[Hashable, bool]]] = {}
        times: Counter[int | str] = Counter()  # an image that a bootstrap draws twice is two
        for own in scores:
            times[own.question.question_id] += 1
            image = (own.question.fields["image_id"], times[own.question.question_id])
            parts.setdefault(own.question.fields["category"], []).append((image, own.right))
        each = {name: mme_score(parts[name])["score"] for name in (*_PERCEPTION, *_COGNITION) if name in parts}
        sums = {
            "perception": sum(each.get(name, 0.0) for name in _PERCEPTION),
            "cognition": sum(each.get(name, 0.0) for name in _COGNITION),
        }
        return {**sums, **each}


def _category(question: Question) -> str:
    return str(question.question_id).split("/")[0]


def _core(text: str) -> str:
    """The question itself, however many blanks stand before what asks for yes or no."""
    return text.replace(SHORT_ANSWER.strip(), "").replace(_YES_OR_NO, "").strip()


def _with_answers(asked: Sequence[Question], data: Path) -> list[Question]:
    known = {category: _answers(data / category) for category in dict.fromkeys(map(_category, asked))}
    numbers: Counter[str] = Counter()
    questions, missing = [], []
    for own in asked:
        own_id, category = str(own.question_id), _category(own)
        stem = own_id.rpartition("/")[2].partition(".")[0]
        answer = known[category].get((stem, _core(own.text)))
        if answer is None:
            missing.append(f"{own_id} {_core(own.text)!r}")
        numbers[own_id] += 1
        fields = {**own.fields, "category": category, "image_id": own_id}
        questions.append(replace(own, question_id=f"{own_id}#{numbers[own_id]}", answer=answer, fields=fields))
    if missing:
        raise InputError(
            f"{len(missing)} of {len(asked)} questions have no answer in the texts of {data}: "
            f"{listed(missing, most=10)}. Give all folders of one release."
        )
    return questions


def _answers(folder: Path) -> dict[tuple[str, str], str]:
    """Read the texts of a sub-task: (name of the image without ending, question) -> ``yes`` or ``no``."""
    texts = folder / "questions_answers_YN"
    answers = {}
    for path in sorted((texts if texts.is_dir() else folder).glob("*.txt")):
        # At "\n" only: a question may hold other characters that part lines.
        for number, line in enumerate(path.read_text(encoding="utf-8").strip().split("\n"), start=1):
            question, _, answer = line.strip().partition("\t")
            if answer.lower() not in ("yes", "no"):
                raise InputError(f"{path}, line {number}: expected a question, a tab, and Yes or No; get it anew.")
            answers[path.stem.partition(".")[0], _core(question)] = answer.lower()
    return answers
