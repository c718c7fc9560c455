"""Intervals: what is drawn together, and how draws become an interval."""

from __future__ import annotations

from pathlib import Path

import pytest

from integrations.llava.evaluation import ScoredAnswer
from integrations.llava.evaluation.tables.bootstrap import difference_interval, draw_numbers, percentile_interval
from integrations.llava.evaluation.tasks.paper import MmeTask
from tests.integrations.llava.evaluation.paper_fixtures import write_mme


def test_draws_keep_units_together_and_count_them_as_often_as_drawn(tmp_path: Path) -> None:
    write_mme(tmp_path)
    task = MmeTask()
    questions = task.load(tmp_path)
    answers = [ScoredAnswer(own, "yes", task.score("yes", own)) for own in questions]
    # Of each image one question is right: whatever is drawn, a sub-task that is there has 50.
    drawn = draw_numbers(task, "mme", answers, ["existence", "perception", "count"], num_draws=50)
    assert set(drawn["perception"]) <= {50.0 * n for n in range(11)}
    assert draw_numbers(task, "mme", answers, ["perception"], num_draws=50) == {"perception": drawn["perception"]}
    assert "existence" not in drawn  # some draws have none of its image

    right = [ScoredAnswer(own, own.answer, task.score(own.answer, own)) for own in questions]
    one = [own for own in questions if own.fields["category"] == "count"][:2]
    pair = [own for own in right if own.question in one]
    wrong = [own for own in answers if own.question.fields["category"] == "count" and own.question not in one]
    assert task.aggregate([*pair, *pair, *wrong])["count"] == pytest.approx(100 * 5 / 6 + 100 * 2 / 3)


def test_intervals_are_percentiles_and_differences_pair_up() -> None:
    draws = [float(n) for n in range(1001)]
    assert percentile_interval(draws) == (25.0, 975.0)
    assert percentile_interval([]) is None
    assert difference_interval(draws, [own - 1 for own in draws]) == (1.0, 1.0)
    assert difference_interval(draws, []) is None
