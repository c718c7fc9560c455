"""What a task is, the registry of tasks, and the question files that tasks read.

A question file is LLaVA's evaluation format with two more keys: JSON lines of ``question_id``, ``image``, ``text``,
``kind`` (the name of a task) and ``answer``.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from layerfuse.errors import InputError, MissingFileError
from layerfuse.registry import Registry

__all__ = ["TASKS", "Question", "Task", "read_questions"]


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        question_id: unique in its file.
        image: file name, relative to the image folder.
        text: the question as the user would put it.
        kind: name of the task that scores the answer.
        answer: the right answer, as its task writes it: text, or numbers for a box.
    """

    question_id: int | str
    image: str
    text: str
    kind: str
    answer: str | tuple[float, ...]


class Task(ABC):
    """A kind of question: how it is asked, how an answer is scored, where the rule comes from.

    Attributes:
        title: a few words for tables.
        source: the benchmark whose scoring rule this is.
        metrics: names of the numbers that `score` returns; the first is the one that tables show.
    """

    title: ClassVar[str]
    source: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)

    def prompt(self, question: Question) -> str:
        """Return the text that the model is asked."""
        return question.text

    @abstractmethod
    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score what a model answered.

        Args:
            answer: anything that a model can write; what cannot be read is wrong, never an error.
            question: the question, with the right answer.

        Returns:
            A number between 0 and 1 for each of ``metrics``.
        """


TASKS: Registry[Task] = Registry("question kind", group="layerfuse.tasks")


def read_questions(path: str | Path) -> list[Question]:
    """Read a question file.

    Args:
        path: JSON lines, one question a line.

    Returns:
        The questions, in the order of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is empty, a line is no question, a kind is unknown, or an id occurs twice.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"question file {path} does not exist; give a .jsonl file with one question a line.")
    questions: list[Question] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            questions.append(_parse(line, f"{path}, line {number}"))
    if not questions:
        raise InputError(f"question file {path} holds no question; give one question a line.")
    twice = [str(key) for key, count in Counter(q.question_id for q in questions).items() if count > 1]
    if twice:
        raise InputError(
            f"question file {path} uses these ids more than once: {', '.join(twice)}; every id names one question."
        )
    return questions


def _parse(line: str, place: str) -> Question:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place} is not JSON ({error}); expected one JSON object a line.") from error
    keys = ("question_id", "image", "text", "kind", "answer")
    missing = [key for key in keys if not isinstance(row, dict) or key not in row]
    if missing:
        raise InputError(f"{place} lacks {', '.join(missing)}; a question has {', '.join(keys)}.")
    TASKS.get(str(row["kind"]))
    answer = row["answer"]
    return Question(
        question_id=row["question_id"],
        image=str(row["image"]),
        text=str(row["text"]),
        kind=row["kind"],
        answer=tuple(float(value) for value in answer) if isinstance(answer, list) else str(answer),
    )
