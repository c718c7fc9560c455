"""Tasks and their questions: what a task is, the registry of tasks, and question files (docs/evaluation.md)."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from integrations.llava._files import json_lines
from layerfuse.errors import InputError, MissingFileError, UserError
from layerfuse.registry import Registry

__all__ = [
    "TASKS",
    "Group",
    "NeededFile",
    "Protocol",
    "Question",
    "ScoredAnswer",
    "Task",
    "check_ids",
    "read_questions",
    "tasks_of",
]

_KEYS = ("question_id", "image", "text", "kind", "answer")

Protocol = Literal["llava", "lmms", "official"]
"""Ways to ask and score: see `Task`."""

Group = Literal["general", "ocrbench", "caption", "comprehension", "extra"]
"""Tables of the paper, and what stands in none of them."""


@dataclass(frozen=True)
class Question:
    """One question about an image, several, or none.

    Attributes:
        question_id: unique in its file.
        image: file name, relative to the image folder; several names, or an empty tuple, where it is not one image.
        text: the question as the user would put it.
        kind: name of the task that scores the answer.
        answer: the right answer, as its task compares it; None where only a server knows it.
        fields: all other keys of its row, such as a category or choices.
    """

    question_id: int | str
    image: str | tuple[str, ...]
    text: str
    kind: str
    answer: Any = None
    fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def images(self) -> tuple[str, ...]:
        """File names of all its images."""
        return (self.image,) if isinstance(self.image, str) else self.image

    def row(self) -> dict[str, Any]:
        """Return its line of a question file."""
        return {**{key: getattr(self, key) for key in _KEYS}, **self.fields}


@dataclass(frozen=True)
class ScoredAnswer:
    """A question, a model's answer, and its scores, name -> number; a right answer has an ``accuracy`` of 1."""

    question: Question
    prediction: str
    scores: Mapping[str, float]

    @property
    def right(self) -> bool:
        """Whether the answer counts as right."""
        return self.scores.get("accuracy") == 1.0

    def row(self) -> dict[str, Any]:
        """Return one line of a predictions file."""
        return {**self.question.row(), "prediction": self.prediction, "scores": dict(self.scores)}


@dataclass(frozen=True)
class NeededFile:
    """A file or folder that a task reads.

    Attributes:
        path: relative to the folder that `Task.load` is given; a pattern such as ``*.parquet`` where there are several.
        what: what is in it, in a few words.
        source: where to get it.
    """

    path: str
    what: str
    source: str


class Task(ABC):
    """A benchmark, or a kind of question: what is asked, how answers are scored, where the rule comes from.

    One object may serve a whole evaluation: what `load` learns, `aggregate` and `submission` may use.

    Args:
        protocol: one of `protocols`; None is the first.

    Attributes:
        title: a few words for tables.
        source: the benchmark whose scoring rule this is.
        question_file: name of the file that `load` reads.
        group: the table of the paper that it stands in.
        protocols: the ways to ask and score that it knows, the default first: ``llava`` as LLaVA-1.5 (and the paper)
            did, ``lmms`` as lmms-eval does, ``official`` by the benchmark's own rule.
        answer_lengths: protocol -> longest answer in tokens, where it says one.
        metric: the number of `aggregate` that tables show.
        parts: more numbers of `aggregate` that tables show below the metric, name -> title.
        shown_as: ``percent`` if tables show 100 times these numbers, ``points`` if they show them as they are.
    """

    title: ClassVar[str] = ""
    source: ClassVar[str] = ""
    question_file: ClassVar[str] = "questions.jsonl"
    group: ClassVar[Group] = "extra"
    protocols: ClassVar[tuple[Protocol, ...]] = ("llava",)
    answer_lengths: ClassVar[Mapping[str, int]] = {}
    metric: ClassVar[str] = "accuracy"
    parts: ClassVar[Mapping[str, str]] = {}
    shown_as: ClassVar[Literal["percent", "points"]] = "percent"
    _protocol: str | None = None

    def __init__(self, protocol: str | None = None) -> None:
        if protocol is not None and protocol not in self.protocols:
            raise InputError(
                f"protocol {protocol!r} is unknown to {type(self).__name__}; it has: {', '.join(self.protocols)}."
            )
        self._protocol = protocol

    @property
    def protocol(self) -> str:
        """The way in which this object asks and scores, one of `protocols`."""
        return self._protocol or self.protocols[0]

    @property
    def max_new_tokens(self) -> int | None:
        """Longest answer under the protocol, in tokens; None leaves it to the evaluation."""
        return self.answer_lengths.get(self.protocol)

    @property
    def note(self) -> str:
        """Return what a reader of its number has to know, such as who judged; empty where there is nothing."""
        return ""

    def needs(self) -> tuple[NeededFile, ...]:
        """Return what `load` reads, images included; here the question file and ``images``."""
        return (
            NeededFile(self.question_file, "questions (docs/evaluation.md)", "your own"),
            NeededFile("images", "the images that questions name", "your own"),
        )

    def unit(self, question: Question) -> Hashable:
        """Return what a bootstrap draws a question with: questions of one unit are drawn together, here each alone."""
        return question.question_id

    def load(self, folder: str | Path) -> list[Question]:
        """Read the questions in a folder; here those of this task in its `question_file`, with images in ``images``.

        Pictures that are no files (in a table, or still to be drawn) are stored as files first: `made_images`.

        Returns:
            The questions; names of images are relative to the folder.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a question cannot be read, or the file has none for this task.
        """
        path = Path(folder) / self.question_file
        asked = [own for own in read_questions(path) if type(self) is TASKS.get(own.kind)]
        if not asked:
            raise InputError(f"question file {path} has no question for {type(self).__name__}; look at its 'kind'.")
        return [replace(own, image=_in_images(own.image)) for own in asked]

    def prompt(self, question: Question) -> str:
        """Return the text that the model is asked."""
        return question.text

    def read(self, question: Question) -> Question:
        """Return the question with its right answer in the form that `score` compares, from the form of its file.

        Raises:
            ValueError: if the task cannot compare with it.
        """
        return replace(question, answer=self.read_answer(question.answer))

    def read_answer(self, value: Any) -> Any:
        """Return a right answer from JSON in the form that `score` compares; here a text, or a number as text.

        Raises:
            ValueError: if the task cannot compare with it.
        """
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value != value:
            raise InputError(f"answer is {json.dumps(value):.80}; give a text or a number.")
        return str(value)

    @abstractmethod
    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score an answer: name -> number, ``accuracy``, 0 to 1, if it can be right. Empty where a server scores.

        The answer is anything that a model can write; one that cannot be read is wrong, never an error.
        """

    def score_all(self, answers: Sequence[tuple[str, Question]]) -> list[Mapping[str, float]]:
        """Score all answers to its questions, in their order; here one after the other."""
        return [self.score(answer, question) for answer, question in answers]

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Sum up the scored answers to all questions: name -> number, here the mean of each score.

        Tables show `metric`. A bootstrap calls this with questions left out and others several times.
        """
        return {name: sum(own.scores[name] for own in scores) / len(scores) for name in scores[0].scores}

    def submission(self, predictions: Sequence[ScoredAnswer]) -> Mapping[str, bytes] | None:
        """Name of a file -> its content, for the predictions of all questions; None where no server scores."""
        return None


TASKS: Registry[Task] = Registry("question kind", group="layerfuse.tasks")


def tasks_of(questions: Sequence[Question], task: Task | None = None) -> dict[str, Task]:
    """Map the kinds of questions, in the order in which they first occur, to `task`, or to their tasks in `TASKS`.

    Raises:
        ValueError: if a kind is unknown.
    """
    return {kind: task or TASKS.get(kind)() for kind in dict.fromkeys(own.kind for own in questions)}


def read_questions(path: str | Path) -> list[Question]:
    """Read a question file: JSON lines, one question a line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming file and line, if the file is empty, a line is no question, a kind is unknown, an answer is
            none that its kind can compare with, or an id occurs twice.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"question file {path} does not exist; give a .jsonl file with one question a line.")
    questions = [_parse(row, f"{path}, line {number}") for number, row in json_lines(path)]
    check_ids(questions, f"question file {path}")
    return questions


def check_ids(questions: Sequence[Question], place: str) -> None:
    """Raise a ValueError for an empty list of questions, and for two whose ids are spelled alike."""
    if not questions:
        raise InputError(f"{place} holds no question; give one question a line.")
    twice = [key for key, count in Counter(str(own.question_id) for own in questions).items() if count > 1]
    if twice:
        raise InputError(f"{place} uses these ids more than once: {', '.join(twice)}; every id names one question.")


def _in_images(image: str | tuple[str, ...]) -> str | tuple[str, ...]:
    return f"images/{image}" if isinstance(image, str) else tuple(f"images/{name}" for name in image)


def _parse(row: Mapping[str, Any], place: str) -> Question:
    missing = [key for key in _KEYS if key not in row]
    if missing:
        raise InputError(f"{place} lacks {', '.join(missing)}; a question has {', '.join(_KEYS)}.")
    own_id, image = row["question_id"], row["image"]
    if isinstance(own_id, bool) or not isinstance(own_id, int | str):
        raise InputError(f"{place}: question_id is {json.dumps(own_id):.80}; give a number or a text.")
    names = [] if image is None else image if isinstance(image, list) else [image]
    if not all(isinstance(name, str) for name in names):
        raise InputError(f"{place}: image is {json.dumps(image):.80}; give a text, several in a list, or null.")
    for key in ("text", "kind"):
        if not isinstance(row[key], str):
            raise InputError(f"{place}: {key} is {json.dumps(row[key]):.80}; give a text.")
    question = Question(
        question_id=own_id,
        image=image if isinstance(image, str) else tuple(names),
        text=row["text"],
        kind=row["kind"],
        answer=row["answer"],
        fields={key: value for key, value in row.items() if key not in _KEYS},
    )
    try:
        return TASKS.get(question.kind)().read(question)
    except UserError as error:
        raise InputError(f"{place}: {error}") from error
