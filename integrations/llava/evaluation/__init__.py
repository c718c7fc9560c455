"""Evaluation: one file a task, one generation loop, one table."""

from __future__ import annotations

from .predict import Answer, check_images, predict, read_image
from .runner import Evaluation, evaluate, read_predictions, score_predictions, write_evaluation
from .scores import KindScores, blind_answers, score_answers, summarise
from .task import TASKS, Question, ScoredAnswer, Task, read_questions
from .tasks import ContainsTask, ExactMatchTask, MultipleChoiceTask, NumberTask, YesNoTask
from .tasks.synthetic import BoxTask, ColorTask, CountingTask, OcrTask, ShapeTask

__all__ = [
    "TASKS",
    "Answer",
    "BoxTask",
    "ColorTask",
    "ContainsTask",
    "CountingTask",
    "Evaluation",
    "ExactMatchTask",
    "KindScores",
    "MultipleChoiceTask",
    "NumberTask",
    "OcrTask",
    "Question",
    "ScoredAnswer",
    "ShapeTask",
    "Task",
    "YesNoTask",
    "blind_answers",
    "check_images",
    "evaluate",
    "predict",
    "read_image",
    "read_predictions",
    "read_questions",
    "score_answers",
    "score_predictions",
    "summarise",
    "write_evaluation",
]
