"""The benchmarks of the paper's tables, as LLaVA-1.5's ``eval.zip`` and their publishers lay them out.

`Task.load` is given the folder that holds them all (LLaVA's ``playground/data/eval``): ``gqa/``, ``pope/``, …
"""

from __future__ import annotations

from .benchmark import BenchmarkTask
from .gqa import GqaTask
from .mme import MmeTask
from .ocrbench import OcrBenchTask
from .pope import PopeTask
from .refcoco import ReferringTask
from .scienceqa import ScienceQaTask
from .textvqa import TextVqaTask
from .vizwiz import VizWizTask
from .vqav2 import VqaV2Task

__all__ = [
    "BenchmarkTask",
    "GqaTask",
    "MmeTask",
    "OcrBenchTask",
    "PopeTask",
    "ReferringTask",
    "ScienceQaTask",
    "TextVqaTask",
    "VizWizTask",
    "VqaV2Task",
]
