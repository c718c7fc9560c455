"""Evaluation: one file a task, one generation loop, one table."""

from __future__ import annotations

from .contract import task_faults
from .data_survey import DataState, survey_data, survey_text
from .judge import Judge
from .judged import JudgedTask
from .report import evaluation_table, read_predictions, write_evaluation
from .runner import Answer, check_images, evaluate, predict, read_image
from .scores import Evaluation, KindScores, blind_answers, score_answers, score_predictions, summarise
from .task import TASKS, NeededFile, Question, ScoredAnswer, Task, read_questions
from .tasks.synthetic import BoxTask, ColorTask, CountingTask, OcrTask, ShapeTask

__all__ = [
    "TASKS",
    "Answer",
    "BoxTask",
    "ColorTask",
    "CountingTask",
    "DataState",
    "Evaluation",
    "Judge",
    "JudgedTask",
    "KindScores",
    "NeededFile",
    "OcrTask",
    "Question",
    "ScoredAnswer",
    "ShapeTask",
    "Task",
    "blind_answers",
    "check_images",
    "evaluate",
    "evaluation_table",
    "predict",
    "read_image",
    "read_predictions",
    "read_questions",
    "score_answers",
    "score_predictions",
    "summarise",
    "survey_data",
    "survey_text",
    "task_faults",
    "write_evaluation",
]
