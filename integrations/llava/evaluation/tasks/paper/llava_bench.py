"""LLaVA-Bench-in-the-Wild: sixty open questions, answers rated by a judge beside those of GPT-4.

Layout: ``llava-bench-in-the-wild/`` with ``questions.jsonl``, ``images/``; for the judge ``context.jsonl`` (a caption
per image), ``answers_gpt4.jsonl`` and, to judge by the published words, LLaVA's ``llava/eval/table/rule.json``, laid
beside them.

Source: Liu et al., "Visual Instruction Tuning", NeurIPS 2023; LLaVA's ``eval_gpt_review_bench`` and
``summarize_gpt_review``. The published judge, gpt-4-0314, is gone; today's give other numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from integrations.llava._files import json_lines
from integrations.llava._text import listed, printable
from layerfuse.errors import InputError

from ...judge import Judge
from ...judged import JudgedTask
from ...published_files import existing_file, read_llava_questions, read_published_json
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from .benchmark import BenchmarkTask

__all__ = ["LlavaBenchTask"]

_FOLDER = "llava-bench-in-the-wild"
_QUESTIONS, _CONTEXT = f"{_FOLDER}/questions.jsonl", f"{_FOLDER}/context.jsonl"
_REFERENCES, _RULES = f"{_FOLDER}/answers_gpt4.jsonl", f"{_FOLDER}/rule.json"
_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_OUR_RULE = (
    "Two assistants answered a user's question about an image, which the context above describes. Rate each answer as "
    "a whole on a scale of 1 to 10, the more the better: how helpful, relevant, accurate and detailed it is. The order "
    "of the answers must not matter. Write on the first line nothing but two numbers with a blank between them, the "
    "scores of Assistant 1 and Assistant 2; below it, explain them."
)
_TEMPERATURE, _LONGEST_REPLY = 0.2, 1024
_NUM_REPLIES = 4


@TASKS.register("llava_bench")
class LlavaBenchTask(JudgedTask, BenchmarkTask):
    """100 times the mean rating of our answers over that of the references, over all questions and by category.

    A reply whose first line is not two numbers is asked for again; the published script counts it as -1 to -1.
    Without a judge the answers are written as the published script reads them.

    Example:
        ``What is the name of this famous sight in the photo?`` is answered freely.
    """

    title = "LLaVA-Bench (in the wild)"
    source = "LLaVA-Bench-in-the-Wild: rating relative to GPT-4's answers"
    protocols = ("llava",)
    metric = "score"
    shown_as = "points"
    question_file = _QUESTIONS
    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 1024}

    def __init__(self, protocol: str | None = None, *, judge: Judge | None = None) -> None:
        super().__init__(protocol, judge=judge)
        self._captions: dict[str, str] = {}
        self._references: dict[str, str] = {}
        self._rules: dict[str, str] = {}

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the questions and images, and what the judge reads."""
        source = "Hugging Face, liuhaotian/llava-bench-in-the-wild"
        return (
            NeededFile(_QUESTIONS, "questions", source),
            NeededFile(f"{_FOLDER}/images", "images", source),
            NeededFile(_CONTEXT, "captions, for a judge", source),
            NeededFile(_REFERENCES, "GPT-4's answers, for a judge", source),
            NeededFile(_RULES, "the judge's instruction (without it ours is taken)", "LLaVA, llava/eval/table"),
        )

    @property
    def note(self) -> str:
        """The judge's name, and whether it was instructed in our words."""
        return super().note + (", our instruction" if self.judge is not None and not self._rules else "")

    def load(self, folder: str | Path) -> list[Question]:
        """Read the questions, and for a judge captions, references and its instruction."""
        questions = read_llava_questions(self, "llava_bench", folder, _QUESTIONS, f"{_FOLDER}/images")
        if self.judge is not None:
            self._captions = _read_texts(existing_file(self, folder, _CONTEXT), "image", "caption")
            self._references = _read_texts(existing_file(self, folder, _REFERENCES), "question_id", "text")
            has_rules = (Path(folder) / _RULES).is_file()
            self._rules = _instructions(read_published_json(self, folder, _RULES), questions) if has_rules else {}
            lacking = [
                str(own.question_id)
                for own in questions
                if str(own.question_id) not in self._references or _image(own) not in self._captions
            ]
            not_asked = sorted(set(self._references) - {str(own.question_id) for own in questions})
            if lacking or not_asked:
                raise InputError(
                    f"{len(lacking)} of {len(questions)} questions lack a caption in {_CONTEXT} or an answer in "
                    f"{_REFERENCES}: {listed(lacking, most=10)}; {len(not_asked)} that are answered there are not "
                    f"asked: {listed(not_asked, most=10)}. Give the files whole."
                )
        return questions

    def judged(self, answer: str, question: Question, judge: Judge) -> Mapping[str, float]:
        """Ask for both ratings."""
        own_id, category = str(question.question_id), question.fields.get("category", "")
        parts = {
            "Context": self._captions[_image(question)] + "\n",
            "Question": question.text + "\n",
            "Assistant 1": f"{self._references[own_id]}\n\n[End of Assistant 1]\n",
            "Assistant 2": f"{answer}\n\n[End of Assistant 2]\n",
            "System": self._rules.get(category, _OUR_RULE) + "\n",
        }
        content = "".join(f"[{name}]\n{text}\n" for name, text in parts.items())
        messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]
        for attempt in range(_NUM_REPLIES):
            reply = judge.ask(messages, temperature=_TEMPERATURE, max_tokens=_LONGEST_REPLY, attempt=attempt)
            ratings = _ratings(reply)
            if ratings is not None:
                return {"reference": ratings[0], "rating": ratings[1]}
        raise InputError(
            f"the judge {judge.model} rates question {own_id} in none of {_NUM_REPLIES} replies, the last: "
            f"{printable(reply)!r}; its first line has to be two numbers. Take another judge."
        )

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Relate mean ratings, over all and by category; nothing without a judge."""
        if not scores[0].scores:
            return {}
        parts: dict[str, list[Mapping[str, float]]] = {"score": [own.scores for own in scores]}
        for own in scores:
            parts.setdefault(own.question.fields.get("category", "other"), []).append(own.scores)
        return {name: _relative(own) for name, own in parts.items()}

    def submission(self, predictions: Sequence[ScoredAnswer]) -> Mapping[str, bytes]:
        """Return the answers as ``eval_gpt_review_bench`` reads them."""
        rows = [
            {
                "question_id": own.question.question_id,
                "prompt": own.question.text,
                "text": own.prediction,
                "answer_id": str(own.question.question_id),
            }
            for own in predictions
        ]
        return {"answers.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}


def _image(question: Question) -> str:
    return question.images[0].rpartition("/")[2]


def _read_texts(path: Path, key: str, value: str) -> dict[str, str]:
    """Texts of a file of JSON lines by one of its keys; several texts become lines."""
    found = {}
    for number, row in json_lines(path):
        if key not in row or not isinstance(row.get(value), str | list):
            raise InputError(f"{path}, line {number} lacks {key} or {value}; get the file anew.")
        found[str(row[key])] = row[value] if isinstance(row[value], str) else "\n".join(map(str, row[value]))
    return found


def _instructions(content: object, questions: Sequence[Question]) -> dict[str, str]:
    """The published instruction for each category that is asked."""
    found = {}
    for category in dict.fromkeys(own.fields.get("category", "") for own in questions):
        rule = content.get(f"llava_bench_{category}") if isinstance(content, dict) else None
        if not isinstance(rule, dict) or not isinstance(rule.get("prompt"), str):
            raise InputError(f"{_RULES} has no prompt for llava_bench_{category}; give LLaVA's file, or none.")
        found[category] = rule["prompt"]
    return found


def _ratings(reply: str) -> tuple[float, float] | None:
    try:
        first, second = map(float, reply.strip().split("\n")[0].replace(",", " ").split())
    except ValueError:
        return None
    return (first, second) if 0 < first <= 10 and 0 <= second <= 10 else None


def _relative(scores: Sequence[Mapping[str, float]]) -> float:
    """Our mean over the reference's, each with three digits, as published."""
    ours, theirs = (round(sum(own[name] for own in scores) / len(scores), 3) for name in ("rating", "reference"))
    return 100 * ours / theirs
