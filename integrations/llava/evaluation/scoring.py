"""From answers to numbers: one row a question, one table a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from integrations.llava.evaluation.task import TASKS, Question
from layerfuse.errors import InputError

__all__ = ["KindScores", "ScoredAnswer", "blind_answers", "score_answers", "summarise"]


@dataclass(frozen=True)
class ScoredAnswer:
    """One question, what a model answered, and its scores.

    Attributes:
        question: the question with the right answer.
        prediction: what the model wrote.
        scores: metric -> number between 0 and 1.
    """

    question: Question
    prediction: str
    scores: Mapping[str, float]

    @property
    def right(self) -> bool:
        """Whether the answer counts as right."""
        return self.scores["accuracy"] == 1.0

    def row(self) -> dict[str, Any]:
        """Return one line of a predictions file."""
        return {**asdict(self.question), "prediction": self.prediction, "scores": dict(self.scores)}


@dataclass(frozen=True)
class KindScores:
    """Numbers of one kind of question.

    Attributes:
        num_questions: how many questions were asked.
        scores: metric -> mean over the questions.
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


def score_answers(questions: Sequence[Question], predictions: Iterable[Mapping[str, Any]]) -> list[ScoredAnswer]:
    """Pair answers with questions by id, and score them.

    Args:
        questions: as `read_questions` returns them.
        predictions: rows with ``question_id`` and ``prediction``, in any order.

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
    return [_score(question, answers[question.question_id]) for question in questions]


def _score(question: Question, prediction: str) -> ScoredAnswer:
    task = TASKS.get(question.kind)()
    return ScoredAnswer(question=question, prediction=prediction, scores=task.score(prediction, question))


def _some(keys: Sequence[object], limit: int = 10) -> str:
    shown = ", ".join(repr(key) for key in keys[:limit])
    return shown if len(keys) <= limit else f"{shown} and {len(keys) - limit} more"


def summarise(answers: Sequence[ScoredAnswer]) -> dict[str, KindScores]:
    """Average scores over the questions of each kind.

    Args:
        answers: scored answers of one model.

    Returns:
        Kind -> numbers, in the order in which the kinds first occur.
    """
    kinds = list(dict.fromkeys(answer.question.kind for answer in answers))
    table: dict[str, KindScores] = {}
    for kind in kinds:
        own = [answer.scores for answer in answers if answer.question.kind == kind]
        means = {metric: sum(scores[metric] for scores in own) / len(own) for metric in TASKS.get(kind).metrics}
        table[kind] = KindScores(num_questions=len(own), scores=means)
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
