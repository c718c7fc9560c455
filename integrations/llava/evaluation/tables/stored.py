"""Where the tables' numbers stand: a folder per checkpoint, protocol and task, from which tables can be drawn again.

OUTPUT/tables.json                       what was asked for, and which data were missing
OUTPUT/CHECKPOINT/PROTOCOL/TASK/         answers.jsonl, predictions.jsonl, metrics.json, submission/
                                score.json          what tables show, with the draws of the bootstrap
                                added_score.json    what a server or a judge elsewhere gave, entered by hand
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from integrations.llava._text import listed
from layerfuse.errors import ExistingFileError, FileAccessError, InputError, MissingFileError
from layerfuse.files import file_digest, write_text

from ..scores import Evaluation
from ..task import TASKS, Task
from .bootstrap import draw_numbers

__all__ = [
    "MissingTask",
    "TablePlan",
    "TaskResult",
    "add_score",
    "forget_result",
    "read_plan",
    "read_result",
    "task_folder",
    "write_plan",
    "write_result",
]

_PLAN, _SCORE, _ADDED, _PREDICTIONS = "tables.json", "score.json", "added_score.json", "predictions.jsonl"


@dataclass(frozen=True)
class MissingTask:
    """A task whose data are not all there: why it was not asked, and what it needs, as rows of path, what, source."""

    state: str
    reason: str
    needs: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class TablePlan:
    """What tables are of.

    Attributes:
        columns: checkpoint and protocol, in the order in which they were asked for; protocol None is each task's first.
        tasks: names, likewise.
        published: size of the published models that stand beside, or ``both``.
        missing: tasks whose data are missing, by name.
    """

    columns: tuple[tuple[str, str | None], ...] = ()
    tasks: tuple[str, ...] = ()
    published: str = "7b"
    missing: Mapping[str, MissingTask] = field(default_factory=dict)

    def joined(self, later: TablePlan) -> TablePlan:
        """This one and what was asked for later, whose findings about data count."""
        return replace(
            later,
            columns=tuple(dict.fromkeys([*self.columns, *later.columns])),
            tasks=tuple(dict.fromkeys([*self.tasks, *later.tasks])),
            missing={name: own for name, own in self.missing.items() if name not in later.tasks} | dict(later.missing),
        )


@dataclass(frozen=True)
class TaskResult:
    """What is known of a checkpoint's answers to a task.

    Attributes:
        protocol: how it was asked and scored.
        note: what a reader has to know, such as the judge's name.
        numbers: all that the task sums up; without its metric where a server or a judge scores.
        num_questions: how many were asked.
        questions: tells whether two checkpoints were asked the same.
        draws: number -> its value in each draw of the bootstrap.
        submission: names of the files that were written for a server.
        predictions: tells whether answers and their scores are those that stand there.
        added: the score that was entered by hand, in the unit that tables show; None if none was.
    """

    protocol: str
    note: str
    numbers: Mapping[str, float]
    num_questions: int
    questions: str
    draws: Mapping[str, Sequence[float]]
    submission: tuple[str, ...]
    predictions: str
    added: float | None = None


def task_folder(output: str | Path, checkpoint: str, protocol: str, task: str) -> Path:
    """The place of one result."""
    return Path(output) / checkpoint / protocol / task


def write_result(
    folder: Path, name: str, task: Task, evaluation: Evaluation, *, questions: str, num_draws: int
) -> None:
    """Write ``score.json``: the last file of a task, so that it is there only when everything is.

    Draws of the same answers and scores are taken from the file that is there.
    """
    numbers = dict(task.aggregate(evaluation.answers))
    shown = [number for number in (task.metric, *task.parts) if number in numbers]
    result = TaskResult(
        protocol=task.protocol,
        note=task.note,
        numbers=numbers,
        num_questions=len(evaluation.answers),
        questions=questions,
        draws={},
        submission=tuple(sorted({file for files in evaluation.submissions.values() for file in files})),
        predictions=_digest(folder),
    )
    earlier = read_result(folder)
    same = earlier is not None and replace(earlier, draws={}, added=None) == result
    if earlier is not None and same and all(len(own) == num_draws for own in earlier.draws.values()):
        draws = earlier.draws
    else:
        draws = draw_numbers(task, name, evaluation.answers, shown, num_draws=num_draws)
    result = replace(result, draws=draws)
    content = {key: value for key, value in asdict(result).items() if key != "added"}
    _write(folder / _SCORE, {"task": name, **content})


def forget_result(folder: Path) -> None:
    """Remove ``score.json``, before the answers that it is of are."""
    (folder / _SCORE).unlink(missing_ok=True)


def read_result(folder: Path) -> TaskResult | None:
    """What stands in a task's folder; None if it is not finished.

    A score that was entered for other answers than those that are there now is left out.
    """
    content = _read(folder / _SCORE)
    if content is None:
        return None
    added = _read(folder / _ADDED)
    fits = added is not None and added["predictions"] == _digest(folder)
    content["submission"] = tuple(content["submission"])
    del content["task"]
    return TaskResult(**content, added=added["score"] if added is not None and fits else None)


def add_score(output: str | Path, checkpoint: str, protocol: str | None, given: Mapping[str, float]) -> None:
    """Enter scores that a server or a judge gave, task -> number as tables show it (percent, or points).

    Raises:
        FileNotFoundError: if the checkpoint was not evaluated there.
        ValueError: if it has no such task, the task is scored here, or the number cannot be its score.
    """
    plan = read_plan(output)
    known = [own for own, _ in plan.columns]
    if checkpoint not in known:
        raise InputError(f"{output} has no checkpoint {checkpoint!r}; it has: {listed(list(dict.fromkeys(known)))}.")
    entered = []
    for name, value in given.items():
        kind = TASKS.get(name)
        own_protocol = protocol or kind.protocols[0]
        folder = task_folder(output, checkpoint, own_protocol, name)
        result = read_result(folder)
        if result is None:
            raise MissingFileError(
                f"{name} of {checkpoint} under {own_protocol} is not finished in {output}; evaluate it first."
            )
        if kind.metric in result.numbers:
            raise ExistingFileError(
                f"{name} of {checkpoint} is scored here: {result.numbers[kind.metric]:.6g}; nothing was entered."
            )
        most = 100.0 if kind.shown_as == "percent" else float("inf")
        if not 0 <= value <= most:
            raise InputError(f"{name}={value:g} is no score; give {'0 to 100' if most == 100 else 'points'}.")
        entered.append((folder, value))
    for folder, value in entered:
        _write(folder / _ADDED, {"score": value, "predictions": _digest(folder)})


def read_plan(output: str | Path) -> TablePlan:
    """What the tables in a folder are of.

    Raises:
        FileNotFoundError: if there are none.
    """
    content = _read(Path(output) / _PLAN)
    if content is None:
        raise MissingFileError(f"{output} holds no tables; evaluate checkpoints with --tasks first.")
    return TablePlan(
        columns=tuple((name, protocol) for name, protocol in content["columns"]),
        tasks=tuple(content["tasks"]),
        published=content["published"],
        missing={
            name: MissingTask(own["state"], own["reason"], tuple((a, b, c) for a, b, c in own["needs"]))
            for name, own in content["missing"].items()
        },
    )


def write_plan(output: str | Path, plan: TablePlan) -> TablePlan:
    """Write what the tables in a folder are to be of, with what stands there from before; return both together."""
    earlier = read_plan(output) if (Path(output) / _PLAN).exists() else TablePlan()
    joined = earlier.joined(plan)
    _write(Path(output) / _PLAN, asdict(joined))
    return joined


def _digest(folder: Path) -> str:
    return file_digest(folder / _PREDICTIONS).hex()[:16] if (folder / _PREDICTIONS).is_file() else ""


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}); remove it, and start the same command again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds something else than a result; give another output.")
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise FileAccessError(
            f"{path} cannot be written ({error.strerror or error}); give another output (--output)."
        ) from error
