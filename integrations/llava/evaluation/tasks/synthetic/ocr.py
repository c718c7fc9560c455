"""Reading text: the whole string must be right."""

from __future__ import annotations

from collections.abc import Mapping

from ...metrics.text import edit_distance, strip_answer
from ...task import TASKS, Question, Task

__all__ = ["OcrTask"]


@TASKS.register("ocr")
class OcrTask(Task):
    """Exact string, case kept; the share of right characters says how near a wrong answer came.

    Character accuracy is ``1 - edits / length``, at least 0, as in the Robust Reading challenges.

    Example:
        ``What does the text say?`` is answered ``K7F``.
    """

    title = "reading text"
    source = "ICDAR Robust Reading: word accuracy and edit distance"
    question_file = "test.jsonl"

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a string; blanks around it, quotes and a final full stop are forgiven."""
        expected = strip_answer(str(question.answer))
        given = strip_answer(answer)
        # A runaway answer is cut: beyond twice the length every further character only adds edits.
        edits = edit_distance(given[: 2 * len(expected)], expected)
        return {
            "accuracy": float(given == expected),
            "character_accuracy": max(0.0, 1 - edits / max(1, len(expected))),
        }
