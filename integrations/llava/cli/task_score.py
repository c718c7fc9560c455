"""A task as a score of the model in training: its questions asked of that model, its answers scored."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from statistics import fmean

from transformers import LlavaProcessor

from integrations.llava.evaluation import (
    TASKS,
    JudgedTask,
    Question,
    Task,
    check_images,
    predict,
    score_predictions,
)
from integrations.llava.inference import Predictor
from integrations.llava.modeling import FusedLlavaForConditionalGeneration
from integrations.llava.training import Score
from layerfuse.errors import InputError

__all__ = ["task_score"]

_LONGEST, _BATCH = 32, 8


def task_score(name: str, folder: str | Path) -> Score:
    """Make a task a score of the name: the number that tables show of it, the mean of its kinds of questions.

    Args:
        name: of the task.
        folder: that it loads its questions and images from.

    Raises:
        ValueError: if there is no such task, its data are at fault, or it cannot be scored here.
        FileNotFoundError: if its questions or images are not there.
    """
    task = TASKS.get(name)()
    questions = task.load(folder)
    check_images(questions, folder)
    if isinstance(task, JudgedTask) or all(question.answer is None for question in questions):
        where = "by a judge" if isinstance(task, JudgedTask) else "on a server"
        raise InputError(f"task {name} is scored {where}, not while a model trains; take another (--eval-task).")
    return Score(name, partial(_score, task, questions, Path(folder)))


def _score(
    task: Task,
    questions: list[Question],
    folder: Path,
    model: FusedLlavaForConditionalGeneration,
    processor: LlavaProcessor,
) -> float:
    answer = partial(Predictor(model, processor), max_new_tokens=task.max_new_tokens or _LONGEST, batch_size=_BATCH)
    predictions = predict(questions, folder, answer, batch_size=_BATCH, task=task)
    evaluation = score_predictions(questions, predictions, task=task)
    return fmean(own.scores[task.metric] for own in evaluation.kinds.values())
