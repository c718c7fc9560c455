"""The report: one HTML file that needs nothing beside it."""

from __future__ import annotations

from .document import write_report

__all__ = [
    "write_report",
]
