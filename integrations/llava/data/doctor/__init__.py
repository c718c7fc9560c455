"""The data doctor: what is wrong with the samples of a file and their images, and a clean file without it."""

from __future__ import annotations

from .cleaning import clean_path, write_clean, write_lines
from .images import find_broken_images
from .policy import usable_indices
from .report import findings_table, sources_table, survey_report, verdict
from .survey import Survey, survey_samples
from .texts import TokenLimit

__all__ = [
    "Survey",
    "TokenLimit",
    "clean_path",
    "find_broken_images",
    "findings_table",
    "sources_table",
    "survey_report",
    "survey_samples",
    "usable_indices",
    "verdict",
    "write_clean",
    "write_lines",
]
