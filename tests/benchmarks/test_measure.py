"""The measuring code that all benchmarks share, the goals, and the rows; no test asserts a time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import measure
from benchmarks.goals import GOALS, Goal, judge, render
from benchmarks.measure import Pace, exponent, ratio, time_in_turn
from benchmarks.memory import extra_bytes, held_bytes
from benchmarks.op_inputs import check, draw_inputs
from benchmarks.session import Session
from layerfuse.ops import deformable_attention
from layerfuse.testing import random_features


def session(path: Path | None = None, **changes: object) -> Session:
    return Session(**{"device": "cpu", "scale": "dry", "goals_of": "cpu", "path": path, **changes})  # type: ignore[arg-type]


def test_candidates_are_timed_in_turn_and_every_second_round_goes_backwards() -> None:
    order: list[str] = []

    def call(label: str) -> None:
        order.append(label)
        time.sleep(0.031)

    calls = {label: (lambda label=label: call(label)) for label in "ab"}
    timings = time_in_turn(calls, device="cpu", pace=Pace(0.0, fewest=3, most=3))
    # Two calls each to warm up and to know how long one takes.
    assert order == ["a", "a", "b", "b", "a", "b", "b", "a", "a", "b"]
    assert {len(timing.wall) for timing in timings.values()} == {3}


@pytest.mark.parametrize(("seconds", "repeats"), [(1e-6, 100), (1e-3, 30), (0.05, 1)])
def test_short_calls_are_repeated_until_a_sample_is_long_enough(
    seconds: float, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(measure, "_first", lambda *_: seconds)  # a busy machine would decide otherwise
    calls = {"a": lambda: order.append("a")}
    timings = time_in_turn(calls, device="cpu", pace=Pace(0.0, fewest=2, most=2))
    assert len(order) == 2 * repeats
    assert len(timings["a"].wall) == 2
    order.clear()
    time_in_turn(calls, device="cpu", pace=Pace(0.0, fewest=2, most=2, repeated=False))
    assert len(order) == 2


def test_what_is_warm_is_called_no_more_often_than_told() -> None:
    order: list[str] = []
    calls = {label: (lambda label=label: order.append(label)) for label in "ab"}
    time_in_turn(calls, device="cpu", pace=Pace(60.0, fewest=2, warm=True))
    assert order == ["a", "b", "b", "a"]


def test_a_round_that_is_slow_for_all_leaves_ratios_alone() -> None:
    assert ratio([1.0, 10.0, 1.0], [2.0, 20.0, 2.0]) == (0.5, 0.5, 0.5)


def test_exponents_are_fitted_on_logarithms() -> None:
    sizes = [10, 20, 40, 80]
    assert exponent(sizes, [3.0 * size**1.5 for size in sizes]) == pytest.approx(1.5)


def test_extra_memory_counts_what_is_freed_before_the_end() -> None:
    def call() -> torch.Tensor:
        large = torch.zeros(1000, 256)  # 1,024,000 bytes
        return large.sum()

    assert 1_024_000 <= extra_bytes(call, device="cpu") < 1_030_000


def test_held_memory_counts_a_storage_once_and_whole() -> None:
    whole = torch.zeros(100)
    features = random_features(8, num_layers=2, grids=(2, 2), batch_size=1)
    assert held_bytes({"a": whole[:10], "b": (whole, None)}) == 400
    assert held_bytes(features) == 2 * 4 * 8 * 4


def test_the_check_sees_a_candidate_that_is_wrong() -> None:
    inputs = draw_inputs(2, 3, levels=2, num_heads=2, head_channels=4, num_points=2)

    def right(value: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return deformable_attention(value, inputs.grids, x, w)

    def wrong_gradient(value: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return right(value, x.detach() + 0 * x, w)

    errors = check({"right": right, "wrong": wrong_gradient}, inputs)
    assert errors["right"] < 1e-5
    assert errors["wrong"] > 0.5


def test_points_are_drawn_away_from_lines_between_cells() -> None:
    locations = draw_inputs(2, 9, num_points=8).locations.detach()
    to_line = (locations * 9 - 0.5).remainder(1)
    assert locations.min() < 0 and locations.max() > 1
    assert to_line.min() > 5e-4 and to_line.max() < 1 - 5e-4


def test_a_failure_is_a_row_and_the_next_thing_runs(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    run = session(path)
    with run.attempt("op forward", "auto"):
        raise RuntimeError("out of\nmemory")
    run.record("op forward", "gather", median_seconds=1.0)
    failed, done = map(json.loads, path.read_text().splitlines())
    assert (failed["status"], failed["error"]) == ("failed", "RuntimeError: out of memory")
    assert done["candidate"] == "gather"
    assert {"command", "commit", "hardware", "threads", "versions", "seed"} <= done.keys()


def test_nothing_is_begun_that_would_end_after_the_deadline() -> None:
    run = session(deadline=0.0)
    assert not run.has_time(5, "training", "layerfuse")
    assert run.rows[0]["status"] == "not measured"
    assert session().has_time(1e9, "training", "layerfuse")


def test_goals_have_names_of_their_own_and_bounds_that_are_numbers() -> None:
    assert len({goal.name for goal in GOALS}) == len(GOALS) > 25
    assert all(float(goal.bound) > 0 for goal in GOALS)
    assert all(bool(goal.peers) != (goal.quantity == "value") for goal in GOALS)


def row(benchmark: str, candidate: str, ratio: float | None = None, **facts: object) -> dict[str, object]:
    versus = {} if ratio is None else {"versus": {"transformers": {"ratio": ratio, "processor_ratio": 0.5}}}
    return {"benchmark": benchmark, "candidate": candidate, "case": "B=1", **versus, **facts}


def outcome(name: str, rows: list[dict[str, object]], **how: str) -> tuple[str, float | None]:
    goal: Goal = next(goal for goal in GOALS if goal.name == name)
    verdict = next(verdict for verdict in judge(rows, goal.device, **how) if verdict.goal is goal)
    return verdict.outcome, verdict.worst


def test_the_worst_row_decides() -> None:
    rows = [row("op forward", "auto", 1 / 9, dtype="float32"), row("op forward", "auto", 0.2, dtype="float32")]
    assert outcome("op-forward", rows) == ("FAIL", 5.0)
    assert outcome("op-forward", rows[:1]) == ("PASS", 9.0)
    assert outcome("op-forward", [row("op forward", "gather", 0.01, dtype="float32")]) == ("not measured", None)
    assert outcome("op-forward", rows[:1], clock="processor") == ("FAIL", 2.0)
    unchecked = row("op forward", "auto", status="failed", error="AssertionError: differs")
    assert outcome("op-forward", [rows[0], unchecked])[0] == "FAIL"  # whatever keys it lacks


def test_of_several_peers_the_best_counts() -> None:
    versus = {"transformers, selected states": {"ratio": 1.004}, "transformers, all states": {"ratio": 0.9}}
    rows = [{**row("taps", "taps, transformers"), "versus": versus}]
    assert outcome("taps", rows) == ("PASS", 1.004)  # 1.00 is 1.00 as it is written
    versus["transformers, selected states"]["ratio"] = 1.006
    assert outcome("taps", rows) == ("FAIL", 1.006)


def test_values_are_judged_and_failed_rows_fail_a_goal() -> None:
    assert outcome("scaling-tokens", [row("exponent in tokens", "linear", value=1.2)]) == ("FAIL", 1.2)
    both = row("exponent in tokens", "linear", value=1.2, processor_value=1.0)
    assert outcome("scaling-tokens", [both], clock="processor") == ("PASS", 1.0)
    assert outcome("scaling-tokens", [row("exponent in tokens", "dense", value=2.0)])[0] == "not measured"
    broken = row("exponent in tokens", "linear", status="failed", error="RuntimeError: no")
    assert outcome("scaling-tokens", [broken, row("exponent in tokens", "linear", value=1.0)])[0] == "FAIL"
    assert "scaling-tokens" in render(judge([broken], "cpu"))
