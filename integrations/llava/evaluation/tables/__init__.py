"""The paper's tables: several checkpoints in columns, published numbers beside, as text, Markdown, CSV and a page."""

from __future__ import annotations

from .files import write_tables
from .stored import add_score, read_plan
from .suite import PAPER_TASKS, checkpoint_names, chosen_tasks, evaluate_tasks
from .text import TEXT_WIDTH

__all__ = [
    "PAPER_TASKS",
    "TEXT_WIDTH",
    "add_score",
    "checkpoint_names",
    "chosen_tasks",
    "evaluate_tasks",
    "read_plan",
    "write_tables",
]
