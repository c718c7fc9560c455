"""Tasks whose answers a judge model scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from .judge import Judge
from .task import Question, Task

__all__ = ["JudgedTask"]


class JudgedTask(Task):
    """A task with no scores of its own: a judge gives them, or none.

    Args:
        protocol: as for every task.
        judge: asked for scores; None leaves answers without, and `load` reads nothing that only a judge needs.
    """

    def __init__(self, protocol: str | None = None, *, judge: Judge | None = None) -> None:
        super().__init__(protocol)
        self.judge = judge

    @property
    def note(self) -> str:
        """The judge's name."""
        return f"judge {self.judge.name}" if self.judge is not None else ""

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Return the judge's scores of an answer; none without a judge."""
        return {} if self.judge is None else self.judged(answer, question, self.judge)

    def score_all(self, answers: Sequence[tuple[str, Question]]) -> list[Mapping[str, float]]:
        """Ask for several scores at a time."""
        if self.judge is None:
            return super().score_all(answers)
        pool = ThreadPoolExecutor(self.judge.num_parallel)
        try:
            return list(pool.map(lambda pair: self.score(*pair), answers))
        finally:
            pool.shutdown(cancel_futures=True)

    @abstractmethod
    def judged(self, answer: str, question: Question, judge: Judge) -> Mapping[str, float]:
        """Ask a judge for the scores of an answer.

        Raises:
            OSError: if the judge gives no reply.
            ValueError: if its reply cannot be read.
        """
