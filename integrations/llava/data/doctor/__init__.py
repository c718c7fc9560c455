"""The data doctor: what is wrong with the samples of a file and their images, and a clean file without it."""

from __future__ import annotations

from .cleaning import clean_path, lines_path, write_clean, write_lines
from .findings import Finding
from .images import find_broken_images
from .policy import check_samples, usable_indices, usable_samples
from .report import findings_table, report, sources_table, verdict
from .survey import Survey, survey_samples
from .texts import TokenLimit

__all__ = [
    "Finding",
    "Survey",
    "TokenLimit",
    "check_samples",
    "clean_path",
    "find_broken_images",
    "findings_table",
    "lines_path",
    "report",
    "sources_table",
    "survey_samples",
    "usable_indices",
    "usable_samples",
    "verdict",
    "write_clean",
    "write_lines",
]
