"""Yes or no: what POPE's and MME's scorers read in an answer, and their numbers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["YesNoCounts", "mme_score", "read_mme_answer", "read_pope_answer"]


@dataclass(frozen=True)
class YesNoCounts:
    """Right and wrong answers, where yes is the positive one.

    Shares of nothing are 0 here; POPE's scorer divides by zero.
    """

    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[bool, bool]]) -> YesNoCounts:
        """Count pairs of whether yes was said, and whether it is right."""
        counted = list(pairs)
        return cls(*(counted.count(pair) for pair in [(True, True), (True, False), (False, False), (False, True)]))

    @property
    def total(self) -> int:
        """How many answers there are."""
        return self.true_positives + self.false_positives + self.true_negatives + self.false_negatives

    @property
    def accuracy(self) -> float:
        """Share of answers that are right."""
        return _share(self.true_positives + self.true_negatives, self.total)

    @property
    def precision(self) -> float:
        """Share of yes that is right."""
        return _share(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """Share of questions to be answered yes that are."""
        return _share(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        precision, recall = self.precision, self.recall
        return _share(2 * precision * recall, precision + recall)

    @property
    def yes_ratio(self) -> float:
        """Share of answers that are yes."""
        return _share(self.true_positives + self.false_positives, self.total)


def read_pope_answer(answer: str) -> bool:
    """Whether POPE's scorer, as LLaVA has it, takes an answer for yes.

    It reads up to the first full stop, deletes commas and splits at blanks: one of the words "No", "not", "no" means
    no, everything else yes, the empty answer and "NO" included.
    """
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"}.intersection(words)


def read_mme_answer(answer: str, *, lenient: bool = False) -> str:
    """Read an answer as MME's tool does: ``yes``, ``no``, or ``other``, which is wrong.

    In lower case, an answer that is one of the words counts, then ``yes`` within its first four characters, then
    ``no`` within them. With `lenient`, as lmms-eval does, blanks around it and all full stops go first, and a single
    ``y`` or ``n`` counts, too.
    """
    said = answer.lower()
    if lenient:
        said = said.strip().replace(".", "")
        said = {"y": "yes", "n": "no"}.get(said, said)
    return next((word for word in ("yes", "no") if word in said[:4]), "other")


def mme_score(rights: Sequence[tuple[Hashable, bool]]) -> Mapping[str, float]:
    """Score one sub-task of MME from pairs of an image and whether a question about it was answered right.

    Returns:
        ``accuracy`` over the questions, ``accuracy_plus`` over the images all of whose questions are right, both 0 to
        1, and ``score``, 100 times their sum.
    """
    images: dict[Hashable, bool] = {}
    for image, right in rights:
        images[image] = images.get(image, True) and right
    accuracy = sum(right for _, right in rights) / len(rights)
    plus = sum(images.values()) / len(images)
    return {"accuracy": accuracy, "accuracy_plus": plus, "score": 100 * accuracy + 100 * plus}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
