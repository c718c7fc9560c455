"""Evaluation: one file a task, one generation loop, one table."""

from __future__ import annotations

from integrations.llava.evaluation.box import BoxTask
from integrations.llava.evaluation.cli import main
from integrations.llava.evaluation.color import ColorTask
from integrations.llava.evaluation.contains import ContainsTask
from integrations.llava.evaluation.counting import CountingTask
from integrations.llava.evaluation.evaluate import (
    Evaluation,
    evaluate,
    read_predictions,
    score_predictions,
    write_evaluation,
)
from integrations.llava.evaluation.exact_match import ExactMatchTask
from integrations.llava.evaluation.multiple_choice import MultipleChoiceTask
from integrations.llava.evaluation.number import NumberTask
from integrations.llava.evaluation.ocr import OcrTask
from integrations.llava.evaluation.predict import Answer, check_images, predict, read_image
from integrations.llava.evaluation.scoring import KindScores, blind_answers, score_answers, summarise
from integrations.llava.evaluation.shape import ShapeTask
from integrations.llava.evaluation.task import TASKS, Question, ScoredAnswer, Task, read_questions
from integrations.llava.evaluation.yes_no import YesNoTask

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
    "main",
    "predict",
    "read_image",
    "read_predictions",
    "read_questions",
    "score_answers",
    "score_predictions",
    "summarise",
    "write_evaluation",
]
