"""How the time of every fuser grows with tokens, levels and batch: exponents of a fit, and the points for the plots.

python -m benchmarks.scaling
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import platform
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

_MATRIX_PRODUCTS = ("attention_pool", "cross_attention", "mmfuser", "spatial_aggregator")
# Bytes of all inputs of a size together, at least, in a full run: more than the last cache of most processors.
_BEYOND_CACHES = 64 * 2**20
# The fuser with a condition; its groups cannot be more than maps, and keys are the class tokens.
_OPTIONS: dict[str, dict[str, Any]] = {"text_gated": {"condition_channels": 64, "groups": 2}}


class Point(NamedTuple):
    """One size that is timed."""

    edge: int
    levels: int
    batch_size: int


def run(session: Session) -> None:
    """Time every fuser along three axes, and fit each."""
    if session.scale == "full" and platform.libc_ver()[0] == "glibc":
        _keep_freed_memory()
    for name in sorted(FUSERS):
        # Those that do little with each number would else show the sizes of caches, and nothing of their own.
        channels = session.pick(256 if name in _MATRIX_PRODUCTS else 1024, 64, 32)
        for axis, points in _axes(session, dense=name in DENSE).items():
            with session.attempt(f"exponent in {axis}", name, case=name):
                _fit(session, name, axis, points, channels)


def _keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the rest of the process.

    It gives blocks of more than 32 MiB back to the system, and pays for each of their pages when it gets them again: of
    a concatenation of 47 MB that is nine tenths of the time, and a step in a line that has none.
    """
    library = ctypes.CDLL(None)
    most_mapped_blocks, trim_threshold = -4, -1
    library.mallopt(most_mapped_blocks, 0)
    library.mallopt(trim_threshold, 2**31 - 1)


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
    pace = dataclasses.replace(session.pace(2.0, fewest=3), repeated=False)
    timings = time_in_turn(calls, device=session.device, pace=pace)
    seconds = [timings[str(index)].median for index in range(len(points))]
    sizes = [_size(axis, point) for point in points]
    facts = {"axis": axis, "fuser": name, "channels": channels, "sizes": sizes, "seconds": seconds}
    facts |= {"points": [point._asdict() for point in points]}
    spent = [timings[str(index)].median_processor for index in range(len(points))]
    facts["processor_value"] = round(exponent(sizes, spent), 3)
    value = round(exponent(sizes, seconds), 3)
    kind = "dense" if name in DENSE else "linear"
    session.record(f"exponent in {axis}", kind, case=name, value=value, unit="exponent", **facts)


def _size(axis: str, point: Point) -> int:
    return {"tokens": point.edge**2, "levels": point.levels, "batch": point.batch_size}[axis]


def _call(session: Session, name: str, point: Point, channels: int) -> Call:
    """Return a call that takes other maps each time, so that those of small sizes do not lie in a cache either."""
    number_of_bytes = 4 * channels * point.edge**2 * point.levels * point.batch_size
    copies = session.pick(min(32, -(-_BEYOND_CACHES // number_of_bytes)), 1, 1)
    inputs = itertools.cycle([_features(session, point, channels, seed) for seed in range(copies)])
    options = _OPTIONS.get(name, {})
    fuser = create_fuser(name, in_channels=channels, num_layers=point.levels, options=options).to(session.device).eval()
    width = fuser.condition_channels
    condition = None if width is None else torch.randn(point.batch_size, width, device=session.device)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return fuser(next(inputs), condition)

    return call


def _features(session: Session, point: Point, channels: int, seed: int) -> FeatureMaps:
    given = random_features(
        *(channels,),
        num_layers=point.levels,
        grids=(point.edge, point.edge),
        batch_size=point.batch_size,
        num_prefix_tokens=1,
        seed=session.seed + seed,
    )
    return given.to(session.device)


if __name__ == "__main__":
    from benchmarks.command import main

    main("scaling")
