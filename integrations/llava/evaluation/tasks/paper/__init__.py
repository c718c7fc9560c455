"""The benchmarks of the paper's tables, as LLaVA-1.5's ``eval.zip`` and their publishers lay them out.

`Task.load` is given the folder that holds them all (LLaVA's ``playground/data/eval``): ``gqa/``, ``pope/``, …
"""

from __future__ import annotations

from .benchmark import BenchmarkTask
from .gqa import GqaTask
from .llava_bench import LlavaBenchTask
from .mm_vet import MmVetTask
from .mmbench import MMBenchCnTask, MMBenchTask
from .mme import MmeTask
from .mmmu import MmmuTask
from .ocrbench import OcrBenchTask
from .pope import PopeTask
from .refcoco import ReferringTask
from .region_captions import RegionCaptionTask
from .scienceqa import ScienceQaTask
from .seed_bench import SeedBenchImageTask, SeedBenchTask
from .textvqa import TextVqaTask
from .vizwiz import VizWizTask
from .vqav2 import VqaV2Task

__all__ = [
    "BenchmarkTask",
    "GqaTask",
    "LlavaBenchTask",
    "MMBenchCnTask",
    "MMBenchTask",
    "MmVetTask",
    "MmeTask",
    "MmmuTask",
    "OcrBenchTask",
    "PopeTask",
    "ReferringTask",
    "RegionCaptionTask",
    "ScienceQaTask",
    "SeedBenchImageTask",
    "SeedBenchTask",
    "TextVqaTask",
    "VizWizTask",
    "VqaV2Task",
]
