"""All tasks for all checkpoints: data looked at first, then one loop after the other, then the tables."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from integrations.llava._text import listed
from integrations.llava.inference import ReadModel, Shard
from layerfuse.errors import InputError

from ..data_survey import DataState, refuse_faults, survey_data
from ..judge import Judge
from ..judged import JudgedTask
from ..runner import evaluate_loaded
from ..task import TASKS, Question, Task
from ..tasks.paper.region_splits import REGION_SPLITS
from .bootstrap import NUM_DRAWS
from .stored import MissingTask, TablePlan, forget_result, read_result, task_folder, write_plan, write_result

__all__ = ["PAPER_TASKS", "checkpoint_names", "chosen_tasks", "evaluate_tasks"]

_LOG = logging.getLogger(__name__)
PAPER_TASKS = (
    *("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn", "seedbench"),
    *("llava_bench", "mm_vet", "mmmu", "ocrbench"),
    *(f"{own.task}_caption" for own in REGION_SPLITS),
    *(own.task for own in REGION_SPLITS),
)
"""Tasks of the paper's tables, in their order, and MMMU."""

JudgeMaker = Callable[[Path], Judge]
"""Makes the judge whose replies are kept in a file."""


def chosen_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """Names of tasks, each once; ``paper`` stands for `PAPER_TASKS`.

    Raises:
        ValueError: if there is no such task.
    """
    found = [one for name in names for one in (PAPER_TASKS if name == "paper" else (name,))]
    for name in found:
        TASKS.get(name)
    return tuple(dict.fromkeys(found))


def checkpoint_names(folders: Sequence[str | Path]) -> dict[str, Path]:
    """A name per checkpoint: of its folder, and where two have one, of as many folders above as tell them apart.

    Raises:
        ValueError: if a checkpoint is given twice.
    """
    parts = [Path(folder).resolve().parts for folder in folders]
    twice = [str(folder) for folder, own in zip(folders, parts, strict=True) if parts.count(own) > 1]
    if twice:
        raise InputError(f"checkpoints are given twice: {listed(sorted(set(twice)))}; give each once.")
    names = {}
    for folder, own in zip(folders, parts, strict=True):
        length = next(n for n in range(1, len(own) + 1) if sum(other[-n:] == own[-n:] for other in parts) == 1)
        names["-".join(part.strip("/\\:") for part in own[-length:])] = Path(folder)
    return names


def evaluate_tasks(
    checkpoints: Sequence[str | Path],
    names: Sequence[str],
    data: str | Path,
    output: str | Path,
    *,
    protocol: str | None = None,
    published: str = "7b",
    judge: JudgeMaker | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    device: str | None = None,
    overwrite: bool = False,
    shard: Shard | None = None,
    num_workers: int | None = None,
    compile: bool = False,
    num_draws: int = NUM_DRAWS,
) -> TablePlan | None:
    """Ask each checkpoint the questions of each task whose data are there, and score the answers.

    What was interrupted goes on: answers are kept as `evaluate` keeps them, and no finished answer is asked again.

    Args:
        checkpoints: folders of models.
        names: of tasks, see `chosen_tasks`.
        data: folder of all data.
        output: where answers, scores and tables stand; several calls may add to one.
        protocol: of all tasks; None takes each task's first. A task that does not know it is left out.
        published: size of the published models that tables show.
        judge: None leaves judged tasks without a score, and writes what a judge elsewhere takes.
        batch_size: questions at a time.
        max_new_tokens: longest answer; None takes each task's.
        stop: texts in front of which answers end.
        device: torch device.
        overwrite: ask anew whatever `output` holds of these.
        shard: which of several processes this is.
        num_workers: processes that prepare images.
        compile: whether decoding is compiled.
        num_draws: of the bootstrap.

    Returns:
        What the tables are of; None where other processes have questions left.

    Raises:
        FileNotFoundError: if no task has its data.
        ValueError: before anything is asked, if data are at fault, or as `evaluate` does.
        OSError: if `output` cannot be written.
    """
    folders = checkpoint_names(checkpoints)
    tasks = {name: TASKS.get(name)() for name in chosen_tasks(names)}
    if protocol is not None:
        tasks = {name: type(own)(protocol) for name, own in tasks.items() if protocol in own.protocols}
        if not tasks:
            raise InputError(f"none of these tasks knows the protocol {protocol!r}; leave it out, or give another.")
    first = next(iter(folders))
    for name, task in tasks.items():
        _give_judge(task, judge, task_folder(output, first, task.protocol, name))
    states = [survey_data(name, task, data) for name, task in tasks.items()]
    refuse_faults(states)
    missing = {own.name: _missing(own) for own in states if own.state != "complete"}
    plan = write_plan(output, TablePlan(tuple((name, protocol) for name in folders), tuple(tasks), published, missing))
    complete = [own for own in states if own.state == "complete"]
    for checkpoint, folder in folders.items():
        read = ReadModel()
        for number, own in enumerate(complete, start=1):
            _LOG.info("%s: %s, task %d of %d", checkpoint, own.name, number, len(complete))
            place = task_folder(output, checkpoint, own.task.protocol, own.name)
            _give_judge(own.task, judge, place)
            if overwrite:
                forget_result(place)
            evaluation = evaluate_loaded(
                folder,
                own.questions,
                data,
                task=own.task,
                output=place,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                stop=stop,
                device=device,
                overwrite=overwrite,
                shard=shard,
                num_workers=num_workers,
                compile=compile,
                read=read,
            )
            if evaluation is not None:
                digest = _digest(own.questions)
                write_result(place, own.name, own.task, evaluation, questions=digest, num_draws=num_draws)
    finished = [
        read_result(task_folder(output, checkpoint, own.task.protocol, own.name))
        for checkpoint in folders
        for own in complete
    ]
    return None if None in finished else plan


def _give_judge(task: Task, judge: JudgeMaker | None, place: Path) -> None:
    if judge is not None and isinstance(task, JudgedTask):
        task.judge = judge(place / "judge.jsonl")


def _missing(state: DataState) -> MissingTask:
    needs = tuple((own.path, own.what, own.source) for own in state.absent)
    return MissingTask(state.state, state.reason, needs)


def _digest(questions: Sequence[Question]) -> str:
    """Tells whether two checkpoints were asked the same, in the same order."""
    text = json.dumps([[str(own.question_id), own.text] for own in questions])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
