"""What every task has to keep to, of whatever package: for the tests of those who write one."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

from layerfuse.errors import InputError, MissingPackageError, UserError

from .runner import check_images
from .scores import score_answers
from .task import TASKS, Group, Protocol, Question, Task, check_ids

__all__ = ["task_faults"]

# What models have been seen to write: nothing, noise, a box, another script, half of a number, far too much.
_ANSWERS = ("", " \n", "Yes.", "A", "[0.1, 0.2, 0.3, 0.4]", "\u4e00\u4e8c", "-.", "1e999", "no yes " * 200)


def task_faults(name: str, folder: str | Path | None = None) -> list[str]:
    """Try a task under each of its protocols; return what it does not keep to, nothing if it is sound.

    Args:
        name: of a task that is registered, or that an installed package announces.
        folder: with data of the task; its questions are loaded, asked, scored and summed up. None leaves that out.
    """
    kind = TASKS.get(name)
    faults = [*_described(kind)]
    for protocol in kind.protocols:
        task = kind(protocol)
        faults += [f"{protocol}: {fault}" for fault in _empty_folder(task)]
        if folder is not None:
            faults += [f"{protocol}: {fault}" for fault in _with_data(task, kind(protocol), Path(folder))]
    return faults


def _described(kind: type[Task]) -> Iterator[str]:
    if not kind.title or not kind.source:
        yield "has no title, or no source"
    if kind.group not in get_args(Group) or kind.shown_as not in ("percent", "points"):
        yield f"group {kind.group!r} or shown_as {kind.shown_as!r} is unknown"
    if not kind.protocols or set(kind.protocols) - set(get_args(Protocol)):
        yield f"protocols are {kind.protocols}; give some of {', '.join(get_args(Protocol))}"
    if set(kind.answer_lengths) - set(kind.protocols) or any(own < 1 for own in kind.answer_lengths.values()):
        yield f"answer_lengths {dict(kind.answer_lengths)} do not fit its protocols"
    if kind.metric in kind.parts:
        yield f"metric {kind.metric!r} is among its parts"
    try:
        kind("unheard of")
        yield "takes a protocol that it does not have"
    except InputError:
        pass


def _empty_folder(task: Task) -> Iterator[str]:
    needs = task.needs()
    if not needs or not all(own.path and own.what and own.source for own in needs):
        yield "needs() says nothing, or leaves path, what or source empty"
    with TemporaryDirectory() as empty:
        try:
            task.load(empty)
            yield "loads questions from an empty folder"
        except MissingPackageError:  # said before the folder was looked at
            return
        except UserError as error:
            if empty not in str(error):
                yield f"does not name the folder that lacks its file: {error}"


def _with_data(task: Task, other: Task, folder: Path) -> Iterator[str]:
    questions = task.load(folder)
    if other.load(folder) != questions:
        yield "loads other questions the second time"
    try:
        check_ids(questions, "the task")
        check_images(questions, folder)
    except UserError as error:
        yield str(error)
        return
    if not all(task.prompt(own).strip() for own in questions if not own.images):
        yield "has an empty prompt without an image"
    if not all(isinstance(task.unit(own), Hashable) for own in questions):
        yield "has a unit that cannot be hashed"
    yield from _scored(task, questions)


def _scored(task: Task, questions: Sequence[Question]) -> Iterator[str]:
    for said in _ANSWERS:
        rows = [{"question_id": own.question_id, "prediction": said} for own in questions]
        answers = score_answers(questions, rows, task=task)
        sums = [task.aggregate(answers), task.aggregate([*answers, *answers])]
        wrong = [f"{name}={value}" for own in sums for name, value in own.items() if not math.isfinite(value)]
        if wrong:
            yield f"sums up the answer {said[:20]!r} to {', '.join(wrong)}"
        files = task.submission(answers)
        if any(task.metric not in own for own in sums) and not files:
            yield f"has neither {task.metric!r} nor a file for a server"
        if files and (task.submission(answers) != files or not all(isinstance(own, bytes) for own in files.values())):
            yield "writes a submission that is no bytes, or others the second time"
