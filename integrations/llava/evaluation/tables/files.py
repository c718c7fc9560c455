"""The tables as files."""

from __future__ import annotations

from pathlib import Path

from layerfuse.errors import FileAccessError
from layerfuse.files import write_text

from .content import build_tables
from .page import tables_page
from .stored import read_plan
from .text import as_csv, as_markdown, as_text

__all__ = ["write_tables"]


def write_tables(output: str | Path) -> str:
    """Draw the tables of what stands in a folder, and write them there: ``tables.txt``, ``.md``, ``.csv``, ``.html``.

    Returns:
        The text.

    Raises:
        FileNotFoundError: if nothing was evaluated there.
        OSError: if they cannot be written.
    """
    plan = read_plan(output)
    tables = build_tables(plan, output)
    text = as_text(tables, plan)
    contents = {
        "tables.txt": text,
        "tables.md": as_markdown(tables, plan),
        "tables.csv": as_csv(tables),
        "tables.html": tables_page(tables, plan),
    }
    try:
        for name, content in contents.items():
            write_text(Path(output) / name, content)
    except OSError as error:
        raise FileAccessError(
            f"{output} cannot be written ({error.strerror or error}); give another output."
        ) from error
    return text
