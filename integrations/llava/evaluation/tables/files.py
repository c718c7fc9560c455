"""The tables as files."""

from __future__ import annotations

from pathlib import Path

from layerfuse.errors import FileAccessError
from layerfuse.files import write_text

from .content import build_tables
from .page import tables_page
from .stored import read_plan
from .text import TEXT_WIDTH, as_csv, as_markdown, as_text

__all__ = ["write_tables"]


def write_tables(output: str | Path, *, width: int = TEXT_WIDTH) -> str:
    """Draw the tables of what stands in a folder, and write them there: ``tables.txt``, ``.md``, ``.csv``, ``.html``.

    Returns:
        The text, for a terminal of `width` characters; the file's is the same everywhere.

    Raises:
        FileNotFoundError: if nothing was evaluated there.
        OSError: if they cannot be written.
    """
    plan = read_plan(output)
    tables = build_tables(plan, output)
    contents = {
        "tables.txt": as_text(tables, plan),
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
    return as_text(tables, plan, width=width)
