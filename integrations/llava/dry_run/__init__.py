"""The dry run: steps, hours and memory of a recipe, computed from its model on the meta device and from its data."""

from __future__ import annotations

from .estimate import Report, StageReport, dry_run
from .gpus import GPUS, Gpu
from .report import render

__all__ = ["GPUS", "Gpu", "Report", "StageReport", "dry_run", "render"]
