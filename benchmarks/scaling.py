"""How the time of every fuser grows with tokens, levels and batch: exponents of a fit, and the points for the plots.

python -m benchmarks.scaling
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.measure import Call, exponent, time_in_turn
from benchmarks.session import Session
from layerfuse import FUSERS, FeatureMaps, create_fuser
from layerfuse.testing import random_features

__all__ = ["DENSE", "Point", "run"]

DENSE = ("cross_attention",)
"""Fusers that compare every query with every value: quadratic in tokens by design, and left out of the goal."""

# The fuser with a condition; its groups cannot be more than maps, and keys are the class tokens.
_OPTIONS: dict[str, dict[str, Any]] = {"text_gated": {"condition_channels": 64, "groups": 2}}


class Point(NamedTuple):
    """One size that is timed."""

    edge: int
    levels: int
    batch_size: int


def run(session: Session) -> None:
    """Time every fuser along three axes, and fit each."""
    channels = session.pick(256, 64, 32)
    for name in sorted(FUSERS):
        for axis, points in _axes(session, dense=name in DENSE).items():
            with session.attempt(f"exponent in {axis}", name, case=name):
                _fit(session, name, axis, points, channels)


def _axes(session: Session, *, dense: bool) -> dict[str, list[Point]]:
    edges = session.pick((24, 48, 72, 96), (12, 24, 36), (4, 8))
    if dense:
        edges = edges[: max(2, len(edges) - 1)]
    edge = session.pick(24, 12, 4)
    return {
        "tokens": [Point(each, 5, 1) for each in edges],
        "levels": [Point(edge, each, 1) for each in session.pick((2, 6, 12, 24), (2, 6, 12), (2, 4))],
        "batch": [Point(edge, 5, each) for each in session.pick((1, 2, 4, 8), (1, 2, 4), (1, 2))],
    }


def _fit(session: Session, name: str, axis: str, points: Sequence[Point], channels: int) -> None:
    """Time all points in turn, so that the machine's moods do not bend the line."""
    calls = {str(index): _call(session, name, point, channels) for index, point in enumerate(points)}
    timings = time_in_turn(calls, device=session.device, pace=session.pace(2.0, fewest=3))
    seconds = [timings[str(index)].median for index in range(len(points))]
    sizes = [_size(axis, point) for point in points]
    facts = {"axis": axis, "fuser": name, "channels": channels, "sizes": sizes, "seconds": seconds}
    facts |= {"points": [point._asdict() for point in points]}
    value = round(exponent(sizes, seconds), 3)
    kind = "dense" if name in DENSE else "linear"
    session.record(f"exponent in {axis}", kind, case=name, value=value, unit="exponent", **facts)


def _size(axis: str, point: Point) -> int:
    return {"tokens": point.edge**2, "levels": point.levels, "batch": point.batch_size}[axis]


def _call(session: Session, name: str, point: Point, channels: int) -> Call:
    given = random_features(
        *(channels,),
        num_layers=point.levels,
        grids=(point.edge, point.edge),
        batch_size=point.batch_size,
        num_prefix_tokens=1,
        seed=session.seed,
    )
    features: FeatureMaps = given.to(session.device)
    options = _OPTIONS.get(name, {})
    fuser = create_fuser(name, in_channels=channels, num_layers=point.levels, options=options).to(session.device).eval()
    width = fuser.condition_channels
    condition = None if width is None else torch.randn(point.batch_size, width, device=session.device)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return fuser(features, condition)

    return call


if __name__ == "__main__":
    from benchmarks.command import main

    main("scaling")
