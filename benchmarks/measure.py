"""Times of several candidates taken in turn, and what is read from them: medians, ratios, exponents."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["Call", "Pace", "Ratio", "Timing", "captured", "exponent", "ratio", "relative_error", "time_in_turn"]

Call = Callable[[], object]

# A sample lasts at least this long, seconds: calls come one behind the other, and their mean is taken. On the CPU
# torch's threads go on waiting for work, and keep a core busy, for some milliseconds after a candidate is done.
_SHORTEST_SAMPLE = {"cpu": 30e-3, "cuda": 5e-3}
_MOST_CALLS = 100


@dataclass(frozen=True)
class Pace:
    """How long a comparison may take.

    Attributes:
        seconds: for all rounds of all candidates; what one round takes is known after the first, which does not count.
        fewest: rounds that are made however long they take.
        most: rounds that are made at most.
        warm: all candidates have run before, and take long: the fewest rounds are made, and all count.
        repeated: a short call is repeated until a sample is long enough; else a sample is one call, which finds no
            memory of its own in a cache.
    """

    seconds: float
    fewest: int = 3
    most: int = 25
    warm: bool = False
    repeated: bool = True


@dataclass(frozen=True)
class Timing:
    """Seconds per call of a candidate, one entry a round.

    Attributes:
        wall: by the clock, on CUDA between two events of the stream.
        processor: that this process spent on all its threads; what others do on a shared machine enters it far less.
    """

    wall: tuple[float, ...]
    processor: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of ``wall``."""
        return statistics.median(self.wall)

    @property
    def median_processor(self) -> float:
        """Median of ``processor``."""
        return statistics.median(self.processor)


class Ratio(NamedTuple):
    """Seconds of one candidate over those of another: median over the rounds, and the middle half of the rounds."""

    median: float
    low: float
    high: float


def time_in_turn(calls: dict[str, Call], *, device: str, pace: Pace) -> dict[str, Timing]:
    """Time candidates in turn, so that a busy moment of the machine hits all of them.

    Every second round goes backwards, so that nobody always follows the same neighbour.

    Args:
        calls: what to time, by label.
        device: ``"cpu"`` or ``"cuda"``.
        pace: how many rounds are made.
    """
    samples: dict[str, list[tuple[float, float]]] = {label: [] for label in calls}
    repeats, rounds = dict.fromkeys(calls, 1), pace.fewest
    if not pace.warm:
        seconds = {label: _first(call, device) for label, call in calls.items()}
        if pace.repeated or device == "cuda":
            repeats = {
                label: max(1, min(_MOST_CALLS, math.ceil(_SHORTEST_SAMPLE[device] / max(once, 1e-7))))
                for label, once in seconds.items()
            }
        one_round = sum(repeats[label] * once for label, once in seconds.items())
        rounds = max(pace.fewest, min(pace.most, int(pace.seconds / max(one_round, 1e-9))))
    for number in range(rounds):
        for label in calls if number % 2 == 0 else reversed(calls):
            samples[label].append(_sample(calls[label], repeats[label], device))
    return {label: Timing(*map(tuple, zip(*values, strict=True))) for label, values in samples.items()}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Compare two candidates round by round, so that what slows a whole round down cancels out."""
    quotients = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    count = len(quotients)
    return Ratio(statistics.median(quotients), quotients[count // 4], quotients[count - 1 - count // 4])


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Fit seconds = a * size ** exponent by least squares on the logarithms."""
    x, y = [math.log(size) for size in sizes], [math.log(value) for value in seconds]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread


def captured(call: Call) -> Call:
    """Return a replay of a CUDA graph of a call: the device's time alone, without the time to launch from Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay(kept: object = result) -> None:
        graph.replay()

    return replay


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def _first(call: Call, device: str) -> float:
    """Return about how many seconds a call takes, once it has run; a long one is not run again to know it."""
    begin = time.perf_counter()
    call()
    _wait(device)
    passed = time.perf_counter() - begin
    return passed if device == "cpu" and passed > 1 else _sample(call, 1, device)[0]


def _sample(call: Call, repeats: int, device: str) -> tuple[float, float]:
    """Return wall and processor seconds per call."""
    _wait(device)
    if device != "cuda":
        start, start_processor = time.perf_counter(), time.process_time()
        for _ in range(repeats):
            call()
        passed, spent = time.perf_counter() - start, time.process_time() - start_processor
        return passed / repeats, spent / repeats
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start_processor = time.process_time()
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / repeats, (time.process_time() - start_processor) / repeats


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
