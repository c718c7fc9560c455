"""Which tasks can be asked with the data of a folder, and what the others lack: told before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from integrations.llava._text import aligned
from layerfuse.errors import FileAccessError, InputError, MissingFileError, MissingPackageError, UserError

from .runner import check_images
from .task import NeededFile, Question, Task, check_ids

__all__ = ["DataState", "refuse_faults", "survey_data", "survey_text"]


@dataclass(frozen=True)
class DataState:
    """What a folder holds of a task's data.

    Attributes:
        name: of the task.
        task: the object that tried to load them.
        state: ``complete``; ``incomplete`` if some of it is there; ``missing`` if nothing is; ``at fault`` if files are
            there, but do not fit one another or cannot be read.
        questions: if complete.
        reason: why not, if not.
        absent: what the task reads that is not there; some only a judge needs.
    """

    name: str
    task: Task
    state: Literal["complete", "incomplete", "missing", "at fault"]
    questions: Sequence[Question] = ()
    reason: str = ""
    absent: tuple[NeededFile, ...] = ()


def survey_data(name: str, task: Task, folder: str | Path) -> DataState:
    """Load a task's questions and look for their images."""
    needs = task.needs()
    absent = tuple(own for own in needs if not _is_there(Path(folder), own.path))
    try:
        questions = task.load(folder)
        check_ids(questions, f"task {name}")
        check_images(questions, folder)
    except (MissingFileError, MissingPackageError) as error:
        there = len(absent) < len(needs)
        return DataState(name, task, "incomplete" if there else "missing", reason=str(error), absent=absent)
    except FileAccessError:
        raise
    except UserError as error:
        return DataState(name, task, "at fault", reason=str(error), absent=absent)
    return DataState(name, task, "complete", questions, absent=absent)


def survey_text(states: Sequence[DataState]) -> str:
    """A line per task, then what is missing and where to get it."""
    rows = [("task", "data", "questions")]
    rows += [(own.name, own.state, f"{len(own.questions):,}" if own.questions else "") for own in states]
    lines = aligned(rows, left=2)
    for own in states:
        if own.state == "complete" and not own.absent:
            continue
        lines += ["", f"{own.name}: {own.reason or 'complete; what follows is not there:'}"]
        lines += [f"  {need.path}: {need.what}; {need.source}" for need in own.absent]
    return "\n".join(lines)


def _is_there(folder: Path, pattern: str) -> bool:
    path = folder / pattern
    return path.exists() or any(folder.glob(pattern))


def refuse_faults(states: Sequence[DataState]) -> None:
    """Raise a ValueError that counts and lists the tasks whose data are at fault, and one if nothing can be asked."""
    faults = [f"\n  {own.name}: {own.reason}" for own in states if own.state == "at fault"]
    if faults:
        raise InputError(
            f"the data of {len(faults)} of {len(states)} tasks are at fault; nothing was asked:{''.join(faults)}"
        )
    if not any(own.state == "complete" for own in states):
        lacking = "".join(f"\n  {own.name}: {own.reason}" for own in states)
        raise MissingFileError(f"no task has its data; give the folder that holds them as --data:{lacking}")
