"""TextVQA, val: questions about text in photographs, ten answers each."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from integrations.llava._text import listed
from layerfuse.errors import InputError

from ...metrics.vqa import soft_vqa_score
from ...published_files import read_llava_questions, read_published_json
from ...task import TASKS, NeededFile, Question
from .benchmark import BenchmarkTask
from .prompts import EVAL_ZIP, SHORT_ANSWER

__all__ = ["TextVqaTask", "question_in_prompt"]

_ASKED = "textvqa/llava_textvqa_val_v051_ocr.jsonl"
_ANNOTATIONS = "textvqa/TextVQA_0.5.1_val.json"
_IMAGES = "textvqa/train_images"
_OLD_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)
_TOKENS = "Reference OCR token: "


@TASKS.register("textvqa")
class TextVqaTask(BenchmarkTask):
    """Soft score against ten people's answers, both sides normalised (`soft_vqa_score`).

    LLaVA's questions bring the words that an OCR system read in the image. ``lmms`` leaves them out, writes the
    question with one capital, and lets answers be 1024 tokens long: another task, whose numbers are much lower.

    Example:
        ``what is the brand of this camera?``, ``Reference OCR token: DAKOTA, DIGITAL`` and the sentence that asks for
        a single word are answered ``Dakota``, which four of ten people said: it scores 1. Three would give 0.9.
    """

    title = "TextVQA"
    source = "TextVQA 0.5.1 val, LLaVA-1.5's eval_textvqa.py"
    question_file = _ASKED
    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 128, "lmms": 1024}

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the questions with OCR tokens, the answers, and the images."""
        where = "dl.fbaipublicfiles.com/textvqa"
        return (
            NeededFile(_ASKED, "questions of the validation set, with OCR tokens", EVAL_ZIP),
            NeededFile(_ANNOTATIONS, "their answers", f"{where}/data/TextVQA_0.5.1_val.json"),
            NeededFile(_IMAGES, "images", f"{where}/images/train_val_images.zip"),
        )

    def load(self, folder: str | Path) -> list[Question]:
        """Read the questions, and their answers by image and question; ids are those of the annotations."""
        asked = read_llava_questions(self, "textvqa", folder, _ASKED, _IMAGES)
        rows = read_published_json(self, folder, _ANNOTATIONS)["data"]
        known = {(row["image_id"], row["question"].lower()): row for row in rows}
        keys = [(own.question_id, question_in_prompt(own.text)) for own in asked]
        missing = [f"{image} {text!r}" for image, text in keys if (image, text) not in known]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(asked)} questions have no answers in {Path(folder) / _ANNOTATIONS}: "
                f"{listed(missing, most=10)}. Give the two files of one version."
            )
        seen: Counter[int] = Counter()
        return [_answered(own, known[key], seen) for own, key in zip(asked, keys, strict=True)]

    def prompt(self, question: Question) -> str:
        """Return the question as LLaVA's file has it, or lmms-eval's, without OCR tokens."""
        return question.text if self.protocol == "llava" else question.fields["question"].capitalize() + SHORT_ANSWER

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a short answer."""
        return {"accuracy": soft_vqa_score(answer, question.answer)}


def question_in_prompt(prompt: str) -> str:
    """Find the question, in lower case, in a prompt of one of the forms that LLaVA's scorer knows.

    Raises:
        ValueError: if the prompt is of another form.
    """
    lines = prompt.split("\n")
    question = None
    if prompt.startswith("OCR tokens: "):
        found = _OLD_PROMPT.search(prompt)
        question = found and found[1]
    elif len(lines) == 3 and _TOKENS in prompt:
        question = lines[1] if lines[0].startswith(_TOKENS.rstrip()) else lines[0]
    elif len(lines) == 2:
        question = lines[0]
    if question is None:
        raise InputError(
            f"prompt {prompt!r:.200} is of no form that TextVQA's scorer reads; it has two lines, the question first, "
            "or three with 'Reference OCR token: ' before or behind the question."
        )
    return question.lower()


def _answered(asked: Question, row: Mapping[str, Any], seen: Counter[int]) -> Question:
    """Give a question its answers, and the annotation's id, which a question that comes again gets a number to."""
    own_id = row["question_id"]
    seen[own_id] += 1
    return replace(
        asked,
        question_id=own_id if seen[own_id] == 1 else f"{own_id}#{seen[own_id]}",
        answer=tuple(row["answers"]),
        fields={**asked.fields, "question": row["question"]},
    )
