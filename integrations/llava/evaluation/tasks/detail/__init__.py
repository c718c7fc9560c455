"""Benchmarks beside the paper's that want detail, which is what fusing layers is for; as the Hugging Face hub has them.

Their rules are those of lmms-eval, by which they are usually reported. `Task.load` is given the folder that holds them
all: ``chartqa/``, ``docvqa/``, …
"""

from __future__ import annotations

from .ai2d import Ai2dTask
from .chartqa import ChartQaTask
from .docvqa import DocVqaTask, DocVqaTestTask, InfoVqaTask, InfoVqaTestTask
from .mmstar import MmStarTask

__all__ = ["Ai2dTask", "ChartQaTask", "DocVqaTask", "DocVqaTestTask", "InfoVqaTask", "InfoVqaTestTask", "MmStarTask"]
