"""How runs stand: what runs, what is finished, what was stopped or failed, read from their folders."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from integrations.llava.config import STAGES

from .run_folder import RunFolder
from .signals import RunInterrupted

__all__ = ["RunStatus", "find_runs", "noted_end", "run_status"]

# Folders below the one that is looked through.
_DEPTH = 4

State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    Attributes:
        folder: of the run.
        state: "running" while a process has the folder; "finished" if the last stage it began is; "stopped" on
            request; "failed" if it ended otherwise, a kill included.
        reason: why it was stopped or failed, as far as it could still say; of a running one, its process.
        stage: the last one that made a step; empty before the first.
        step: the last one logged.
        steps: of the stage, in all; None where an older version began it.
        loss: of that step.
        evaluation: what the last evaluation measured, `loss` and scores.
        best_step: of the best evaluation of a finished stage; None if there was none.
        seconds: since the log last grew, or since the folder changed.
    """

    folder: Path
    state: State
    reason: str
    stage: str
    step: int
    steps: int | None
    loss: float | None
    evaluation: dict[str, float]
    best_step: int | None
    seconds: float


def find_runs(folder: str | Path) -> list[RunStatus]:
    """List the runs in a folder and those below it, or the one that it is, by path; no run lies in another's folder.

    Raises:
        ValueError: if a file of a run is damaged.
    """
    return [run_status(path) for path in sorted(_run_folders(Path(folder), _DEPTH))]


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if any((folder / name).is_file() for name in (".running.json", "run.json")):
        yield folder
    elif depth and folder.is_dir():
        with os.scandir(folder) as entries:
            below = [Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        for path in below:
            yield from _run_folders(path, depth - 1)


def run_status(folder: str | Path) -> RunStatus:
    """Read how a run stands; nothing in its folder changes.

    Raises:
        ValueError: if one of its files is damaged.
    """
    run = RunFolder(folder)
    noted, rows = run.noted(), list(run.rows())
    stage = next((name for name in reversed(STAGES) if name in noted.get("samples", {})), "")
    own = [row for row in rows if row["stage"] == stage]
    last: dict[str, Any] = next((row for row in reversed(own) if "loss" in row), {})
    measured: dict[str, Any] = next((row for row in reversed(own) if "loss" not in row), {})
    state, reason = _state(run, stage)
    grew = next((path for path in (run.path / "metrics.jsonl", run.path) if path.exists()), run.path)
    return RunStatus(
        folder=run.path,
        state=state,
        reason=reason,
        stage=stage,
        step=last.get("step", 0),
        steps=noted.get("steps", {}).get(stage),
        loss=last.get("loss"),
        evaluation={key[len("eval_") :]: value for key, value in measured.items() if key.startswith("eval_")},
        best_step=noted.get("best", {}).get(stage, {}).get("step"),
        seconds=max(time.time() - grew.stat().st_mtime, 0.0),
    )


def _state(run: RunFolder, stage: str) -> tuple[State, str]:
    holder = run.holder()
    if holder is not None:
        return "running", holder
    noted = run.noted()
    if noted.get("ended") is not None:
        return noted["ended"]["kind"], noted["ended"]["reason"]
    if stage and stage in run.finished:
        return "finished", ""
    if "ended" not in noted:  # an older version does not say how it ended
        return "stopped", ""
    return "failed", "its process ended without a word (killed, or out of memory?)"


class noted_end(AbstractContextManager[None]):  # noqa: N801 (used as a function)
    """Lets a run's folder say why the block ended early, where it has made a step; errors go on their way."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is not None:
            reason = str(error).strip() or type(error).__name__
            self.folder.note_end("stopped" if isinstance(error, RunInterrupted) else "failed", reason)
