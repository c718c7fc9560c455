"""The goals as data, and the verdict on each from the rows of a run. Both commands judge alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

__all__ = ["GOALS", "Goal", "Verdict", "judge", "render"]

TRANSFORMERS, COMPILED = "transformers", "transformers, compiled"
SELECTED, ALL_STATES, STOP_EARLY = "transformers, selected states", "transformers, all states", "timm, stop_early"


@dataclass(frozen=True)
class Goal:
    """A bound that every row of a benchmark has to keep.

    Attributes:
        name: short, unique.
        device: of the run, "cpu" or "cuda".
        benchmark: of the rows.
        candidate: whose rows; ours.
        peers: labels that it is compared with; of several that were measured, with the best. Empty where the row's own
            value is judged.
        quantity: "speedup" is the peer's cost over ours, "share" ours over the peer's, "value" the row's value.
        comparison: ">=" or "<=", with the bound; numbers are rounded to the bound's decimals first.
        bound: as printed, such as "8" or "0.98".
        where: further keys of the rows that count, with their value.
    """

    name: str
    device: Literal["cpu", "cuda"]
    benchmark: str
    candidate: str
    peers: tuple[str, ...]
    quantity: Literal["speedup", "share", "value"]
    comparison: Literal[">=", "<="]
    bound: str
    where: Mapping[str, Any] = field(default_factory=dict)


class Verdict(NamedTuple):
    """What a run says of a goal.

    Attributes:
        outcome: "PASS", "FAIL" or "not measured".
        worst: the number that is judged, of the row that comes out worst; None if there is none.
        of: which row that is.
        rows: how many rows counted.
    """

    goal: Goal
    outcome: Literal["PASS", "FAIL", "not measured"]
    worst: float | None
    of: str
    rows: int


def _op_goals() -> list[Goal]:
    auto, peers, fp32 = "auto", (TRANSFORMERS,), {"dtype": "float32"}
    forward, both = "op forward", "op forward+backward"
    return [
        Goal("op-forward", "cpu", forward, auto, peers, "speedup", ">=", "8.0", fp32),
        Goal("op-forward+backward", "cpu", both, auto, peers, "speedup", ">=", "4.0", fp32),
        Goal("op-memory-forward", "cpu", f"{forward}, extra memory", auto, peers, "share", "<=", "0.40"),
        Goal("op-memory-forward+backward", "cpu", f"{both}, extra memory", auto, peers, "share", "<=", "0.40"),
        Goal("op-bf16", "cpu", "op bf16 against fp32", "bfloat16", ("float32",), "share", "<=", "1.00"),
        Goal("op-share-of-block", "cpu", "sampling in the block", "mmfuser", (), "value", "<=", "0.40"),
    ]


def _encoder_goals() -> list[Goal]:
    taps, taps_timm, held, fused = "taps, transformers", "taps, timm", "taps, memory held", "mmfuser"
    return [
        Goal("taps", "cpu", "taps", taps, (SELECTED, ALL_STATES), "share", "<=", "1.00"),
        Goal("taps-timm", "cpu", "taps", taps_timm, (STOP_EARLY,), "share", "<=", "1.00"),
        Goal("taps-memory", "cpu", held, taps, (SELECTED,), "share", "<=", "1.00"),
        Goal("taps-memory-timm", "cpu", held, taps_timm, (STOP_EARLY,), "share", "<=", "1.00"),
        Goal("taps-memory-of-all", "cpu", held, taps, (ALL_STATES,), "share", "<=", "0.25"),
        Goal("encoder", "cpu", "encoder", fused, (SELECTED,), "share", "<=", "0.98"),
        Goal("encoder-all-states", "cpu", "encoder", fused, (ALL_STATES,), "share", "<=", "0.95"),
        Goal("encoder-gpu", "cuda", "encoder", fused, (SELECTED, ALL_STATES), "share", "<=", "1.00"),
    ]


def _cuda_op_goals() -> list[Goal]:
    found = []
    for name in ("op forward", "op forward+backward"):
        short, of_bandwidth = name.replace(" ", "-"), f"{name}, share of bandwidth"
        found += [
            Goal(f"{short}-compiled", "cuda", name, "auto", (COMPILED,), "speedup", ">=", "3.0"),
            Goal(f"{short}-deformops", "cuda", name, "auto", ("deformops",), "speedup", ">=", "1.00"),
            Goal(f"{short}-roofline", "cuda", of_bandwidth, "auto", (), "value", ">=", "0.50"),
        ]
    return [
        *found,
        Goal("auto-is-fastest", "cuda", "op choice, of the fastest", "auto", (), "value", "<=", "1.05"),
        Goal("blocks-are-best", "cuda", "op blocks, of the fastest", "as set", (), "value", "<=", "1.05"),
    ]


def _llava_goals() -> list[Goal]:
    ours, plain, training = "layerfuse", ("transformers",), "training, seconds per token"
    found = [
        Goal("train", "cpu", training, "layerfuse, padding-free", plain, "speedup", ">=", "1.3"),
        Goal("train-same-model", "cpu", training, "layerfuse, no fuser, padding-free", plain, "speedup", ">=", "1.3"),
    ]
    for stage in ("pretrain", "finetune"):
        where = {"stage": stage}
        found += [
            Goal(f"{stage}-speed", "cuda", training, ours, plain, "speedup", ">=", "1.5", where),
            Goal(f"{stage}-mfu", "cuda", "training, MFU", ours, (), "value", ">=", "0.50", where),
        ]
    share = "fuser's share of the first token"
    return [
        *found,
        Goal("first-token", "cuda", "generation, first token", ours, plain, "speedup", ">=", "2.0"),
        Goal("tokens-per-second", "cuda", "generation, seconds per token", ours, plain, "speedup", ">=", "2.0"),
        Goal("fuser-of-first-token", "cuda", share, "mmfuser", (), "value", "<=", "0.03"),
    ]


GOALS: tuple[Goal, ...] = (
    *_op_goals(),
    *_encoder_goals(),
    Goal("scaling-tokens", "cpu", "exponent in tokens", "linear", (), "value", "<=", "1.1"),
    *_cuda_op_goals(),
    *_llava_goals(),
)
"""All goals of speed and memory."""


def judge(rows: Sequence[Mapping[str, Any]], device: str, *, clock: str = "wall") -> list[Verdict]:
    """Judge a device's goals by rows, times by the "wall" clock or by that of the "processor"."""
    return [_verdict(goal, rows, clock) for goal in GOALS if goal.device == device]


def render(verdicts: Iterable[Verdict]) -> str:
    """Write verdicts as a table."""
    lines = [("goal", "against", "rows", "worst", "goal is", "outcome", "worst row")]
    for verdict in verdicts:
        goal, unit = verdict.goal, "x" if verdict.goal.quantity == "speedup" else ""
        worst = "" if verdict.worst is None else f"{verdict.worst:.{max(_decimals(goal.bound), 2)}f}{unit}"
        bound = f"{goal.comparison} {goal.bound}{unit}"
        lines.append((goal.name, " | ".join(goal.peers), str(verdict.rows), worst, bound, verdict.outcome, verdict.of))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _verdict(goal: Goal, rows: Sequence[Mapping[str, Any]], clock: str) -> Verdict:
    counted = [row for row in rows if _counts(goal, row)]
    failed = [row for row in counted if row.get("status") == "failed"]
    numbers = [(number, row) for row in counted if (number := _number(goal, row, clock)) is not None]
    if failed:
        return Verdict(goal, "FAIL", None, failed[0].get("error", ""), len(numbers))
    if not numbers:
        why = next((row["why"] for row in counted if "why" in row), "")
        return Verdict(goal, "not measured", None, why, 0)
    pick = min if goal.comparison == ">=" else max
    worst, row = pick(numbers, key=lambda entry: entry[0])
    rounded, bound = round(worst, _decimals(goal.bound)), float(goal.bound)
    passed = rounded >= bound if goal.comparison == ">=" else rounded <= bound
    return Verdict(goal, "PASS" if passed else "FAIL", worst, row.get("case", ""), len(numbers))


def _counts(goal: Goal, row: Mapping[str, Any]) -> bool:
    same = row["benchmark"] == goal.benchmark and row["candidate"] == goal.candidate
    # A row of what failed need not know all of its keys.
    missing = {} if row.get("status") != "failed" else goal.where
    return same and all(row.get(key, missing.get(key)) == value for key, value in goal.where.items())


def _number(goal: Goal, row: Mapping[str, Any], clock: str) -> float | None:
    if goal.quantity == "value":
        return row.get(f"{clock}_value", row.get("value"))
    versus = row.get("versus", {})
    key = (
        "processor_ratio" if clock == "processor" and "processor_ratio" in next(iter(versus.values()), {}) else "ratio"
    )
    shares = [versus[peer][key] for peer in goal.peers if peer in versus]
    if not shares:
        return None
    # Ours over the best peer's: the largest.
    return max(shares) if goal.quantity == "share" else 1 / max(shares)


def _decimals(bound: str) -> int:
    return len(bound.partition(".")[2])
