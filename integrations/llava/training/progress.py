"""How a stage gets on, as a line of text: its step, loss, speed, the time left, and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress

import torch

__all__ = ["Progress", "describe_evaluation", "describe_seconds", "peak_memory"]


class Progress:
    """Sums up steps from one line to the next; `step` is the last that was made when this start began."""

    def __init__(self, stage: str, step: int, max_steps: int) -> None:
        self.stage, self.start, self.max_steps = stage, step, max_steps
        self.began = self.last = time.monotonic()
        self.rows: list[Mapping[str, float]] = []
        self.paused = 0.0

    def add(self, row: Mapping[str, float], *, samples: float, tokens: float) -> None:
        """Count a step, and the samples and tokens of it, into the next line."""
        self.rows.append({**row, "samples": samples, "tokens": tokens})

    def pause(self, seconds: float) -> None:
        """Leave seconds in which no step was made out of the next line's speed."""
        self.paused += seconds

    def parts(self) -> list[str] | None:
        """Take the next line, in parts, the step first and the time left last; None if no step was counted."""
        rows, self.rows = self.rows, []
        if not rows:
            return None
        now = time.monotonic()
        seconds = max(now - self.last - self.paused, 1e-6)
        self.last, self.paused = now, 0.0
        step = int(rows[-1]["step"])
        samples, tokens = (sum(row[key] for row in rows) / seconds for key in ("samples", "tokens"))
        left = (now - self.began) / (step - self.start) * (self.max_steps - step)
        memory = peak_memory()
        return [
            f"{self.stage} {step}/{self.max_steps}",
            f"loss {sum(row['loss'] for row in rows) / len(rows):.4f}",
            f"learning rate {rows[-1]['learning_rate']:.3g}",
            f"{samples:.3g} samples/s" if samples < 100 else f"{samples:,.0f} samples/s",
            f"{tokens:,.0f} tokens/s",
            *([] if memory is None else [f"{memory / 2**30:.2f} GiB"]),
            f"{describe_seconds(left)} left",
        ]


def describe_evaluation(stage: str, row: Mapping[str, float], seconds: float) -> str:
    """Line of an evaluation: a row of the log whose numbers begin with `eval_`, and what it took."""
    numbers = [f"{key.removeprefix('eval_')} {value:.4f}" for key, value in row.items() if key.startswith("eval_")]
    return f"{stage} {row['step']:g}: evaluation  {'  '.join(numbers)}  in {describe_seconds(seconds)}"


def describe_seconds(seconds: float) -> str:
    """Time as one reads it: `7 s`, `12:03`, `1:02:03`, `2 days 01:02`."""
    whole = round(seconds)
    minutes, seconds = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} day{'s' * (days > 1)} {hours:02d}:{minutes:02d}"
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}" if minutes else f"{seconds} s"


def peak_memory() -> int | None:
    """Most bytes in use so far: on the GPU by tensors, without one by the process; None where that is not told."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(ImportError):  # there is none on Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return None
