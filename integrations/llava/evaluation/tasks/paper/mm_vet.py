"""MM-Vet: 218 open questions that take several abilities at once, graded by a judge from 0 to 1.

Layout: LLaVA's ``mm-vet/llava-mm-vet.jsonl`` (questions), ``mm-vet/images/``; for a judge MM-Vet's
``mm-vet/mm-vet.json`` (right answers, abilities) and, to judge by the published words, ``mm-vet/judge_prompt.txt``: the
few-shot prompt of MM-Vet's evaluator, everything before the line of the question at hand. It is theirs; put it there
yourself.

Source: Yu et al., "MM-Vet: Evaluating Large Multimodal Models for Integrated Capabilities", ICML 2024;
``mm-vet_evaluator``. The official grades are those of its own page with gpt-4-0613.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from integrations.llava._text import listed
from layerfuse.errors import FileAccessError, InputError

from ...judge import Judge
from ...judged import JudgedTask
from ...published_files import read_llava_questions, read_published_json
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from .benchmark import BenchmarkTask
from .prompts import EVAL_ZIP

__all__ = ["MmVetTask"]

_QUESTIONS, _ANSWERS = "mm-vet/llava-mm-vet.jsonl", "mm-vet/mm-vet.json"
_PROMPT, _IMAGES = "mm-vet/judge_prompt.txt", "mm-vet/images"
_STEP_BY_STEP = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
)
_OUR_PROMPT = """\
Grade a model's answer against the right one, from 0.0 (wrong) to 1.0 (right) in steps of 0.1. Where the right answer
has <AND>, all of its parts are needed; where it has <OR>, any one of them will do. Complete the last line of the table
with the grade, and write nothing else.

Question | Right answer | Answer | Grade
--- | --- | --- | ---
How many legs do the animals have? | 4 <AND> 2 | one has 4 | 0.5
How many legs do the animals have? | 4 <AND> 2 | 6 and 8 | 0.0
What is the man's trade? | baker <OR> pastry cook | He bakes bread. | 1.0
"""
_NUDGE = "\nPredict the correctness of the answer (digit): "
_NUM_REPLIES = 6


@TASKS.register("mm_vet")
class MmVetTask(JudgedTask, BenchmarkTask):
    """The mean grade, and that of each ability; without a judge, the file that MM-Vet's own page grades.

    As in the published evaluator a reply that is no number from 0 to 1 is asked for again, up to five times, at a
    higher temperature and with one more line; then the grade is 0, and ``ungraded`` counts it.

    Under ``lmms`` the model is told to think step by step.

    Example:
        ``What is x in the equation?`` is answered freely; ``x = -1 or x = 5`` is graded.
    """

    title = "MM-Vet"
    source = "MM-Vet: mean grade of its few-shot judge"
    metric = "score"
    question_file = _QUESTIONS
    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 1024, "lmms": 1024}
    _longest_replies: ClassVar[Mapping[str, int]] = {"llava": 3, "lmms": 128}
    _judge_prompt: str = ""

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the questions and images, and what the judge reads."""
        source = "MM-Vet, mm-vet.zip"
        return (
            NeededFile(_QUESTIONS, "questions", EVAL_ZIP),
            NeededFile(_IMAGES, "images", source),
            NeededFile(_ANSWERS, "right answers, for a judge", source),
            NeededFile(_PROMPT, "the judge's prompt (without it ours is taken)", "MM-Vet, mm-vet_evaluator"),
        )

    @property
    def note(self) -> str:
        """The judge's name, and whether it was prompted in our words."""
        return super().note + (", our prompt" if self.judge is not None and not self._judge_prompt else "")

    def load(self, folder: str | Path) -> list[Question]:
        """Read the questions, and for a judge right answers, abilities and its prompt."""
        questions = read_llava_questions(self, "mm_vet", folder, _QUESTIONS, _IMAGES)
        if self.judge is None:
            return questions
        content = read_published_json(self, folder, _ANSWERS)
        rows = content if isinstance(content, dict) else {}
        keys = [f"v1_{own.question_id}" for own in questions]
        missing = [key for key in keys if "answer" not in rows.get(key, {})]
        not_asked = sorted(set(rows) - set(keys))
        if missing or not_asked:
            raise InputError(
                f"{Path(folder) / _ANSWERS} has no answer to {len(missing)} of {len(keys)} questions: "
                f"{listed(missing, most=10)}; {len(not_asked)} of its own are not asked: {listed(not_asked, most=10)}. "
                "Give both files whole."
            )
        prompt = Path(folder) / _PROMPT
        try:
            self._judge_prompt = prompt.read_text(encoding="utf-8") if prompt.is_file() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise FileAccessError(f"{prompt} cannot be read ({error}); give a text in UTF-8.") from error
        return [
            replace(
                own, answer=rows[key]["answer"], fields={**own.fields, "capability": rows[key].get("capability", [])}
            )
            for own, key in zip(questions, keys, strict=True)
        ]

    def prompt(self, question: Question) -> str:
        """Return the question."""
        return _STEP_BY_STEP + question.text if self.protocol == "lmms" else question.text

    def judged(self, answer: str, question: Question, judge: Judge) -> Mapping[str, float]:
        """Ask for a grade."""
        right = question.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        asked = (self._judge_prompt or _OUR_PROMPT) + "\n" + " | ".join([question.text, right, answer, ""])
        length = self._longest_replies[self.protocol]
        for attempt in range(_NUM_REPLIES):
            content = asked + _NUDGE if attempt else asked
            temperature = 0.5 * max(0, attempt - 1)
            messages = [{"role": "user", "content": content}]
            reply = judge.ask(messages, temperature=temperature, max_tokens=length, attempt=attempt)
            grade = _grade(reply)
            if grade is not None:
                return {"score": grade, "ungraded": 0.0}
        return {"score": 0.0, "ungraded": 1.0}

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Average grades, over all and by ability; nothing without a judge."""
        if not scores[0].scores:
            return {}
        parts: dict[str, list[float]] = {}
        for own in scores:
            for ability in own.question.fields.get("capability", []):
                parts.setdefault(ability, []).append(own.scores["score"])
        return {**super().aggregate(scores), **{name: sum(own) / len(own) for name, own in sorted(parts.items())}}

    def submission(self, predictions: Sequence[ScoredAnswer]) -> Mapping[str, bytes]:
        """Return the file that MM-Vet's page grades."""
        said = {f"v1_{own.question.question_id}": own.prediction for own in predictions}
        return {"mm-vet.json": json.dumps(said, indent=2).encode()}


def _grade(reply: str) -> float | None:
    try:
        grade = float(reply.strip().split(" ")[0])
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None
