"""A run of benchmarks: its scale and device, and its rows, each written as soon as it is known."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from benchmarks.measure import Call, Pace, Timing, ratio, time_in_turn

__all__ = ["RESULTS", "Scale", "Session", "say"]

RESULTS = Path(__file__).parent / "results"
Scale = Literal["full", "quick", "dry"]
_T = TypeVar("_T")
_PACKAGES = ("torch", "triton", "transformers", "timm", "accelerate", "deformops")


def say(text: str) -> None:
    """Print a line at once; benchmarks are commands."""
    print(text, flush=True)


class Session:
    """Collects rows: prints each as it comes, and writes them as JSON lines.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        scale: "full"; "quick": fewer and smaller shapes, less often; "dry": tiny, once, to see that everything runs.
        goals_of: whose goals the rows are judged by, "cpu" or "cuda"; a dry run of the GPU's is made on the CPU.
        seed: of all random numbers.
        note: free text that goes into every row, such as what else the machine was doing.
        path: file to append to, or None to write nothing.
        deadline: `time.monotonic()` after which nothing new is begun; None for no such time.
    """

    def __init__(
        self,
        *,
        device: str,
        scale: Scale,
        goals_of: str,
        seed: int = 0,
        note: str = "",
        path: Path | None = None,
        deadline: float | None = None,
    ) -> None:
        self.device, self.scale, self.goals_of, self.seed = device, scale, goals_of, seed
        self.path, self.deadline = path, deadline
        self.rows: list[dict[str, Any]] = []
        self.topic = ""
        self.common = {
            "command": " ".join(["python", *_module(), *sys.argv[1:]]),
            "commit": _commit(),
            "date": time.strftime("%Y-%m-%d"),
            "hardware": _hardware(device),
            "threads": torch.get_num_threads(),
            "versions": _versions(),
            "scale": scale,
            "seed": seed,
            "note": note,
        }

    def pick(self, full: _T, quick: _T, dry: _T) -> _T:
        """Return what the run's scale takes of three."""
        return {"full": full, "quick": quick, "dry": dry}[self.scale]

    def pace(self, seconds: float, *, fewest: int = 3) -> Pace:
        """Return the pace of a comparison that may take so many seconds in a full run."""
        quick = Pace(min(seconds / 8, 1.0), fewest=min(fewest, 2), most=7)
        return self.pick(Pace(seconds, fewest), quick, Pace(0.0, fewest=1, most=1))

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile for one shape; a dry run traces only, which needs no compiler."""
        backend = "eager" if self.scale == "dry" else "inductor"
        return torch.compile(function, dynamic=False, backend=backend)

    def compare(
        self,
        benchmark: str,
        calls: Mapping[str, Call],
        *,
        ours: tuple[str, ...],
        pace: Pace,
        case: str,
        facts: Mapping[str, Any],
        errors: Mapping[str, float] | None = None,
        per: float = 1.0,
    ) -> dict[str, Timing]:
        """Time candidates against each other and record one row per candidate.

        Args:
            benchmark: what is measured.
            calls: what to time, by label; with ``per``, what it does so many of.
            ours: labels that are compared with each of the others.
            pace: how many rounds.
            case: the shape in a few words.
            facts: shapes, dtype and other circumstances.
            errors: relative error of each candidate against float64, where it was checked.
            per: seconds are recorded per one of these, such as per token.
        """
        timings = time_in_turn(calls, device=self.device, pace=pace)
        self.record_timings(benchmark, timings, ours=ours, case=case, facts=facts, errors=errors, per=per)
        return timings

    def record_timings(
        self,
        benchmark: str,
        timings: Mapping[str, Timing],
        *,
        ours: tuple[str, ...],
        case: str,
        facts: Mapping[str, Any],
        errors: Mapping[str, float] | None = None,
        per: float = 1.0,
    ) -> None:
        """Record one row per candidate; arguments are those of `compare`."""
        for label, timing in timings.items():
            versus = {}
            for peer, other in timings.items() if label in ours else ():
                if peer == label:
                    continue
                wall, processor = ratio(timing.wall, other.wall), ratio(timing.processor, other.processor)
                versus[peer] = {"ratio": _short(wall.median), "low": _short(wall.low), "high": _short(wall.high)}
                if self.device == "cpu":
                    versus[peer]["processor_ratio"] = _short(processor.median)
            self.record(
                benchmark,
                label,
                case=case,
                **facts,
                median_seconds=_short(timing.median / per),
                processor_seconds=_short(timing.median_processor / per),
                rounds=len(timing.wall),
                versus=versus,
                **({"relative_error": _short(errors[label])} if errors and label in errors else {}),
            )

    def compare_values(
        self, benchmark: str, values: Mapping[str, float], *, ours: tuple[str, ...], unit: str, case: str, **facts: Any
    ) -> None:
        """Record one row per candidate for costs that need no repetition, such as bytes."""
        for label, value in values.items():
            others = {peer: other for peer, other in values.items() if label in ours and peer != label and other}
            versus = {peer: {"ratio": _short(value / other)} for peer, other in others.items()}
            self.record(benchmark, label, case=case, value=_short(value), unit=unit, versus=versus, **facts)

    def not_measured(self, benchmark: str, candidate: str, why: str, **facts: Any) -> None:
        """Record that something is not measured, and why."""
        self.record(benchmark, candidate, status="not measured", why=why, **facts)

    @contextmanager
    def attempt(self, benchmark: str, candidate: str, **facts: Any) -> Iterator[None]:
        """Record a failure of what is done inside as a row, and go on; nothing else of the run is lost by it."""
        try:
            yield
        except Exception as error:
            if self.scale != "full":
                traceback.print_exc()
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.record(benchmark, candidate, status="failed", error=text, **facts)
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def has_time(self, seconds: float, benchmark: str, candidate: str, **facts: Any) -> bool:
        """Say whether something that takes so long may begin before the deadline; if not, a row says so."""
        left = float("inf") if self.deadline is None else self.deadline - time.monotonic()
        if left < seconds:
            why = f"it takes about {seconds:.0f} s, and {max(left, 0):.0f} s were left (--minutes)"
            self.not_measured(benchmark, candidate, why, **facts)
        return left >= seconds

    def record(self, benchmark: str, candidate: str, **facts: Any) -> None:
        """Print a row and append it to the file."""
        row = {"topic": self.topic, "benchmark": benchmark, "candidate": candidate, **facts}
        self.rows.append(row)
        shown = {key: value for key, value in row.items() if key not in _UNSAID}
        versus = [
            f"{1 / entry['ratio']:.2f}x {peer}" if entry["ratio"] else f"0 of {peer}"
            for peer, entry in row.get("versus", {}).items()
        ]
        texts = [f"{key}={value}" for key, value in shown.items()]
        say(f"  {benchmark} · {candidate} · {row.get('case', '')}  " + "  ".join([*texts, *versus]))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, **self.common}) + "\n")
                file.flush()
                os.fsync(file.fileno())


# What a printed row leaves out: it is in the file.
_UNSAID = {
    *("axis", "fuser", "sizes", "seconds", "points"),
    *("topic", "benchmark", "candidate", "case", "versus", "batch_size", "dtype", "grid", "levels", "channels"),
    *("processor_seconds", "stage", "layers", "tokens"),
}


def _short(value: float) -> float:
    """Round to five digits."""
    return float(f"{value:.5g}")


def _module() -> list[str]:
    """Return how this program was started, as far as Python tells."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return [sys.argv[0]] if spec is None else ["-m", spec.name.removesuffix(".__main__")]


def _hardware(device: str) -> str:
    """Name the accelerator, or the processor with the number of cores that this process may use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{models[0] if models else platform.processor() or platform.machine()}, {cores} cores"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


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
    return described.stdout.strip() or "unknown"
