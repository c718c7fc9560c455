"""Evaluation: one file a task, one generation loop, one table."""

from __future__ import annotations

from integrations.llava.evaluation.box import BoxTask
from integrations.llava.evaluation.cli import main
from integrations.llava.evaluation.color import ColorTask
from integrations.llava.evaluation.counting import CountingTask
from integrations.llava.evaluation.evaluate import Evaluation, evaluate, read_predictions, write_evaluation
from integrations.llava.evaluation.ocr import OcrTask
from integrations.llava.evaluation.predict import Answer, check_images, predict, read_image
from integrations.llava.evaluation.scoring import (
    KindScores,
    ScoredAnswer,
    blind_answers,
    score_answers,
    summarise,
)
from integrations.llava.evaluation.shape import ShapeTask
from integrations.llava.evaluation.task import TASKS, Question, Task, read_questions

__all__ = [
    "TASKS",
    "Answer",
    "BoxTask",
    "ColorTask",
    "CountingTask",
    "Evaluation",
    "KindScores",
    "OcrTask",
    "Question",
    "ScoredAnswer",
    "ShapeTask",
    "Task",
    "blind_answers",
    "check_images",
    "evaluate",
    "main",
    "predict",
    "read_image",
    "read_predictions",
    "read_questions",
    "score_answers",
    "summarise",
    "write_evaluation",
]
