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

from integrations.llava.json_lines import json_lines
from layerfuse.errors import InputError, MissingFileError, UserError
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

    def read_answer(self, value: Any) -> str | tuple[float, ...]:
        """Read the right answer as a question file has it.

        Args:
            value: from JSON.

        Returns:
            What `score` compares with; here a text, or a number as text.

        Raises:
            ValueError: if the task cannot compare with it.
        """
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
            raise InputError(f"answer is {json.dumps(value):.80}; give a text or a number.")
        return str(value)

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
        ValueError: if the file is empty, a line is no question, a kind is unknown, an answer is none that its kind can
            compare with, or an id occurs twice; file and line are named.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"question file {path} does not exist; give a .jsonl file with one question a line.")
    questions = [_parse(row, f"{path}, line {number}") for number, row in json_lines(path)]
    if not questions:
        raise InputError(f"question file {path} holds no question; give one question a line.")
    twice = [key for key, count in Counter(str(q.question_id) for q in questions).items() if count > 1]
    if twice:
        raise InputError(
            f"question file {path} uses these ids more than once: {', '.join(twice)}; every id names one question."
        )
    return questions


def _parse(row: Mapping[str, Any], place: str) -> Question:
    keys = ("question_id", "image", "text", "kind", "answer")
    missing = [key for key in keys if key not in row]
    if missing:
        raise InputError(f"{place} lacks {', '.join(missing)}; a question has {', '.join(keys)}.")
    own_id = row["question_id"]
    if isinstance(own_id, bool) or not isinstance(own_id, int | str):
        raise InputError(f"{place}: question_id is {json.dumps(own_id):.80}; give a number or a text.")
    for key in ("image", "text", "kind"):
        if not isinstance(row[key], str):
            raise InputError(f"{place}: {key} is {json.dumps(row[key]):.80}; give a text.")
    try:
        answer = TASKS.get(row["kind"])().read_answer(row["answer"])
    except UserError as error:
        raise InputError(f"{place}: {error}") from error
    return Question(question_id=own_id, image=row["image"], text=row["text"], kind=row["kind"], answer=answer)
