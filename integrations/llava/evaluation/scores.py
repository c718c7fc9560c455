"""From answers to numbers: one row a question, one table a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerfuse.errors import InputError

from .task import Question, ScoredAnswer, Task, tasks_of

__all__ = ["KindScores", "blind_answers", "score_answers", "summarise"]


@dataclass(frozen=True)
class KindScores:
    """Numbers of one kind of question.

    Attributes:
        num_questions: how many questions were asked.
        scores: what the kind's task aggregates; the mean of each score, if it does nothing else.
    """

    num_questions: int
    scores: Mapping[str, float]

    @property
    def accuracy(self) -> float:
        """The number that tables show, between 0 and 1."""
        return self.scores["accuracy"]

    @property
    def standard_error(self) -> float:
        """Of the accuracy, from the number of questions alone: sqrt(p (1 - p) / n)."""
        return (self.accuracy * (1 - self.accuracy) / self.num_questions) ** 0.5


def score_answers(
    questions: Sequence[Question], predictions: Iterable[Mapping[str, Any]], *, task: Task | None = None
) -> list[ScoredAnswer]:
    """Pair answers with questions by id, and score them.

    Args:
        questions: as `read_questions` returns them.
        predictions: rows with ``question_id`` and ``prediction``, in any order.
        task: of all questions; None takes the task of each question's kind.

    Returns:
        One scored answer per question, in the order of the questions.

    Raises:
        ValueError: if an answer is missing, comes twice, or belongs to no question.
    """
    rows = list(predictions)
    counts = Counter(row["question_id"] for row in rows)
    known = {question.question_id for question in questions}
    faults = {
        "missing": [key for key in (q.question_id for q in questions) if key not in counts],
        "given more than once": [key for key, count in counts.items() if count > 1],
        "of no question": [key for key in counts if key not in known],
    }
    found = [f"{what}: {_some(keys)}" for what, keys in faults.items() if keys]
    if found:
        raise InputError(
            f"predictions do not fit the {len(questions)} questions; question ids {'; '.join(found)}. "
            "Give exactly one prediction per question."
        )
    answers = {row["question_id"]: str(row["prediction"]) for row in rows}
    tasks = tasks_of(questions, task)
    scored = []
    for own in questions:
        said = answers[own.question_id]
        scored.append(ScoredAnswer(own, said, tasks[own.kind].score(said, own)))
    return scored


def _some(keys: Sequence[object], limit: int = 10) -> str:
    shown = ", ".join(repr(key) for key in keys[:limit])
    return shown if len(keys) <= limit else f"{shown} and {len(keys) - limit} more"


def summarise(answers: Sequence[ScoredAnswer], *, task: Task | None = None) -> dict[str, KindScores]:
    """Aggregate the scores of each kind of question.

    Args:
        answers: scored answers of one model.
        task: of all questions; None takes the task of each question's kind.

    Returns:
        Kind -> numbers, in the order in which the kinds first occur.
    """
    table = {}
    for kind, own_task in tasks_of([own.question for own in answers], task).items():
        own = [answer for answer in answers if answer.question.kind == kind]
        table[kind] = KindScores(num_questions=len(own), scores=own_task.aggregate(own))
    return table


def blind_answers(questions: Sequence[Question], train_turns: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Answer as one who knows the training answers but never sees an image: the chance level to beat.

    Args:
        questions: to be answered.
        train_turns: question and answer of every training turn.

    Returns:
        Prediction rows: the commonest training answer to the same question; for a question that training never asked,
        the commonest answer to any training question that shares its kind with one of ``questions``, else empty.
    """
    by_text: dict[str, Counter[str]] = {}
    for text, answer in train_turns:
        by_text.setdefault(text, Counter())[answer] += 1
    by_kind: dict[str, Counter[str]] = {}
    for text, kind in {question.text: question.kind for question in questions}.items():
        by_kind.setdefault(kind, Counter()).update(by_text.get(text, Counter()))

    def commonest(question: Question) -> str:
        counts = by_text.get(question.text) or by_kind[question.kind]
        # Ties are broken by the answer itself, so that the level does not depend on the order of the file.
        return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else ""

    return [{"question_id": question.question_id, "prediction": commonest(question)} for question in questions]
