"""The tables as one HTML page: styles are inside, nothing is fetched, and it prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .content import ComparisonTable
from .stored import TablePlan
from .text import EXPLANATION, NoteList, sources_of

__all__ = ["tables_page"]

_PAGE = Path(__file__).parent / "page"


def tables_page(tables: Sequence[ComparisonTable], plan: TablePlan) -> str:
    """Draw the page."""
    environment = Environment(loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("tables.html.j2").render(
        tables=tables,
        plan=plan,
        notes=NoteList(),
        sources=sources_of(tables),
        explanation=EXPLANATION,
        style=Markup((_PAGE / "tables.css").read_text(encoding="utf-8")),
    )
