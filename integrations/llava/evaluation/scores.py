"""From predictions to numbers: each prediction scored, each kind of question summed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from integrations.llava._text import listed
from layerfuse.errors import InputError

from .task import Question, ScoredAnswer, Task, tasks_of

__all__ = ["Evaluation", "KindScores", "blind_answers", "score_answers", "score_predictions", "summarise"]


@dataclass(frozen=True)
class KindScores:
    """Numbers of one kind of question: how many were asked, and the scores that its task sums up."""

    num_questions: int
    scores: Mapping[str, float]

    @property
    def accuracy(self) -> float:
        """The number that tables show, between 0 and 1."""
        return self.scores["accuracy"]

    @property
    def standard_error(self) -> float:
        """Standard error of the accuracy, from the number of questions alone: sqrt(p (1 - p) / n)."""
        return (self.accuracy * (1 - self.accuracy) / self.num_questions) ** 0.5


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model by kind of question, and all scored answers in the order of the questions.

    Attributes:
        submissions: question kind -> files that its server takes, name -> content; no entry where no server scores.
    """

    kinds: Mapping[str, KindScores]
    answers: Sequence[ScoredAnswer]
    submissions: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)

    def metrics(self) -> dict[str, Any]:
        """JSON-able numbers: per kind, and the mean accuracy over the kinds that have one."""
        kinds = {kind: {"num_questions": own.num_questions, **own.scores} for kind, own in self.kinds.items()}
        accuracies = [own.accuracy for own in self.kinds.values() if "accuracy" in own.scores]
        mean = {"mean_accuracy": sum(accuracies) / len(accuracies)} if accuracies else {}
        return {"kinds": kinds, **mean, "num_questions": len(self.answers)}


def score_answers(
    questions: Sequence[Question], predictions: Iterable[Mapping[str, Any]], *, task: Task | None = None
) -> list[ScoredAnswer]:
    """Pair predictions with questions by id, and score them, in the order of the questions.

    Rows of predictions have ``question_id`` and ``prediction``, in any order; `task` is that of all questions, None
    that of each one's kind.

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
    found = [f"{len(keys):,} {what}: {listed([*map(repr, keys)], most=10)}" for what, keys in faults.items() if keys]
    if found:
        raise InputError(
            f"predictions do not fit the {len(questions):,} questions; question ids, {'; '.join(found)}. "
            "Give exactly one prediction per question."
        )
    answers = {row["question_id"]: str(row["prediction"]) for row in rows}
    scored = {}
    for kind, own_task in tasks_of(questions, task).items():
        pairs = [(answers[own.question_id], own) for own in questions if own.kind == kind]
        for (_, own), scores in zip(pairs, own_task.score_all(pairs), strict=True):
            scored[own.question_id] = scores
    return [ScoredAnswer(own, answers[own.question_id], scored[own.question_id]) for own in questions]


def summarise(answers: Sequence[ScoredAnswer], *, task: Task | None = None) -> dict[str, KindScores]:
    """Sum up scored answers by kind of question, in the order in which the kinds first occur; see `score_answers`."""
    table = {}
    for kind, own_task in tasks_of([own.question for own in answers], task).items():
        own = [answer for answer in answers if answer.question.kind == kind]
        table[kind] = KindScores(num_questions=len(own), scores=own_task.aggregate(own))
    return table


def score_predictions(
    questions: Sequence[Question], predictions: Iterable[Mapping[str, Any]], *, task: Task | None = None
) -> Evaluation:
    """Score predictions, sum the scores up, and write what servers take; arguments and errors as `score_answers`."""
    answers = score_answers(questions, predictions, task=task)
    submissions = {}
    for kind, own in tasks_of(questions, task).items():
        files = own.submission([answer for answer in answers if answer.question.kind == kind])
        if files is not None:
            submissions[kind] = files
    return Evaluation(summarise(answers, task=task), answers, submissions)


def blind_answers(questions: Sequence[Question], train_turns: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Answer as one who knows question and answer of every training turn but sees no image: the level to beat.

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
