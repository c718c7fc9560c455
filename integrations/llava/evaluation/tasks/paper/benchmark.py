"""What the paper's benchmarks have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from layerfuse.errors import InputError

from ...task import Group, Protocol, Question, Task

__all__ = ["BenchmarkTask", "ServedTask"]


class BenchmarkTask(Task):
    """A benchmark whose questions come from its published files, never from a question file of one's own."""

    group: ClassVar[Group] = "general"
    protocols: ClassVar[tuple[Protocol, ...]] = ("llava", "lmms")

    def read(self, question: Question) -> Question:
        """Refuse a question of one's own: sums may need more of it than a question file says.

        Raises:
            ValueError: always.
        """
        raise InputError(
            f"kind {question.kind!r} is a benchmark, whose questions are read from its own files (--task "
            f"{question.kind}); for questions of your own take a kind such as exact_match, yes_no or multiple_choice."
        )


class ServedTask(BenchmarkTask):
    """A benchmark whose right answers only a server knows: answers are written as it takes them."""

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score nothing."""
        return {}
