"""How far a number moves with the questions: 95 % intervals from draws of questions, with replacement.

A draw takes as many units of a task as it has (`Task.unit`: an image with both of its questions for MME) and sums them
up anew, as the task itself does. The draws depend on the task alone, so that those of two checkpoints pair up: the
interval of a difference is that of the differences of each draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence

import numpy as np

from ..task import ScoredAnswer, Task

__all__ = ["NUM_DRAWS", "difference_interval", "draw_numbers", "percentile_interval"]

NUM_DRAWS = 1000
_DIGITS = 6


def draw_numbers(
    task: Task, name: str, answers: Sequence[ScoredAnswer], numbers: Sequence[str], *, num_draws: int = NUM_DRAWS
) -> dict[str, list[float]]:
    """Sum up each draw of the answers to all questions of a task.

    Args:
        task: sums up; the object that loaded the questions.
        name: of the task; draws depend on it and on the number of units.
        answers: to all questions.
        numbers: those of `Task.aggregate` that are wanted.
        num_draws: how many.

    Returns:
        Number -> its value in each draw; nothing where there are fewer than two units, or where a draw has no such
        number, as in parts of few questions.
    """
    units: dict[Hashable, list[ScoredAnswer]] = {}
    for own in answers:
        units.setdefault(task.unit(own.question), []).append(own)
    groups = list(units.values())
    if len(groups) < 2 or not numbers:
        return {}
    seed = hashlib.sha256(f"{name} {len(groups)}".encode()).digest()
    random = np.random.default_rng(int.from_bytes(seed[:8], "big"))
    drawn: dict[str, list[float]] = {number: [] for number in numbers}
    for _ in range(num_draws):
        picked = random.integers(len(groups), size=len(groups)).tolist()
        try:
            sums = task.aggregate([own for index in picked for own in groups[index]])
        except ZeroDivisionError:  # a task of one's own that counts on an answer which this draw lacks
            sums = {}
        for number in numbers:
            if number in sums:
                drawn[number].append(round(sums[number], _DIGITS))
    return {number: own for number, own in drawn.items() if len(own) == num_draws}


def percentile_interval(draws: Sequence[float]) -> tuple[float, float] | None:
    """Lower and upper end of the middle 95 % of draws; None where there are none."""
    if not draws:
        return None
    low, high = np.percentile(draws, [2.5, 97.5]).tolist()
    return low, high


def difference_interval(draws: Sequence[float], others: Sequence[float]) -> tuple[float, float] | None:
    """The same for the draws of a number minus those of another one, of the same questions."""
    if not draws or len(draws) != len(others):
        return None
    return percentile_interval((np.asarray(draws) - np.asarray(others)).tolist())
