"""Timing side by side, and rows that say how a number came about."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

__all__ = ["Seconds", "Session", "describe_hardware", "median_seconds", "relative_error"]


class Seconds(NamedTuple):
    """Seconds per call.

    Args:
        wall: by the clock.
        processor: spent by this process on all its threads; what others do on a shared machine enters it far less.
    """

    wall: float
    processor: float


def median_seconds(candidates: Mapping[str, Callable[[], object]], *, runs: int, device: str) -> dict[str, Seconds]:
    """Time candidates in turn, so that a busy moment of the machine hits all of them.

    Args:
        candidates: what to time, by label.
        runs: timed calls of each, after two that are not timed.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        Medians per call, by label.
    """
    seconds: dict[str, list[Seconds]] = {label: [] for label in candidates}
    for run in range(runs + 2):
        for label, call in candidates.items():
            _wait(device)
            start, start_processor = time.perf_counter(), time.process_time()
            call()
            _wait(device)
            if run >= 2:
                passed = Seconds(time.perf_counter() - start, time.process_time() - start_processor)
                seconds[label].append(passed)
    return {
        label: Seconds(*(statistics.median(column) for column in zip(*values, strict=True)))
        for label, values in seconds.items()
    }


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def describe_hardware(device: str) -> str:
    """Name the accelerator, or the processor with the number of its cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


class Session:
    """Collects rows: prints each as it comes, and writes them as JSON lines.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        seed: of all random numbers.
        note: free text that goes into every row, such as what else the machine was doing.
        path: file to append to, or None to write nothing.
    """

    def __init__(self, *, device: str, seed: int, note: str, path: Path | None) -> None:
        self.device = device
        self.path = path
        self.common = {
            "command": " ".join(["python", *sys.argv]),
            "commit": _commit(),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": describe_hardware(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "seed": seed,
            "note": note,
        }

    def compare(
        self,
        benchmark: str,
        candidates: Mapping[str, Callable[[], object]],
        *,
        baseline: str,
        runs: int,
        facts: Mapping[str, Any],
        errors: Mapping[str, float] | None = None,
    ) -> None:
        """Time candidates against each other and record one row per candidate.

        Args:
            benchmark: what is measured.
            candidates: calls by label.
            baseline: the label that ratios are taken to; above 1 is faster than it.
            runs: timed calls of each.
            facts: shapes, dtype and other circumstances.
            errors: relative error of each candidate against float64, where it was checked.
        """
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        medians = median_seconds(candidates, runs=runs, device=self.device)
        for label, seconds in medians.items():
            row = {
                "benchmark": benchmark,
                "candidate": label,
                **facts,
                "median_seconds": round(seconds.wall, 6),
                "median_processor_seconds": round(seconds.processor, 6),
                "runs": runs,
                "baseline": baseline,
                "times_faster_than_baseline": round(medians[baseline].wall / seconds.wall, 3),
                "times_less_processor_than_baseline": round(medians[baseline].processor / seconds.processor, 3),
                "load_average_before": None if load is None else round(load, 2),
                **({"relative_error": errors[label]} if errors and label in errors else {}),
            }
            self.record(row)

    def record(self, row: Mapping[str, Any]) -> None:
        """Print a row and append it to the file."""
        shown = {key: value for key, value in row.items() if key not in ("baseline", "load_average_before")}
        print("  ".join(f"{key}={value}" for key, value in shown.items()), flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({**row, **self.common}) + "\n")


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _commit() -> str:
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
    except FileNotFoundError:
        return "unknown"
    return described.stdout.strip() or "not committed yet"
