"""Writes made-up questions of all benchmarks in their layouts, and two tiny checkpoints: to try the tables with.

Run:
    make eval-fixtures
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.integrations.llava.evaluation import paper_fixtures, table_fixtures
from tests.integrations.llava.inference.answering_parts import save_run
from tests.integrations.llava.tiny_parts import save_backbone

__all__ = ["main", "write_checkpoints", "write_data"]


def write_data(folder: Path, *, parquet: bool = True) -> None:
    """All benchmarks; those that are parquet if told so, which needs pyarrow."""
    for write in (*paper_fixtures.WRITERS.values(), *table_fixtures.WRITERS.values()):
        write(folder)
    if parquet:
        table_fixtures.write_parquet(folder)


def write_checkpoints(folder: Path) -> tuple[Path, Path]:
    """Two models that were never trained, yet answer, each in its own way."""
    with tempfile.TemporaryDirectory() as scratch:
        backbone = save_backbone(Path(scratch) / "backbone")
        first = save_run(folder / "tiny-a", backbone, positions=4096, ends=4.0)
        return first, save_run(folder / "tiny-b", backbone, positions=4096, ends=4.0, seed=1)


def main(argv: list[str]) -> int:
    folder = Path(argv[0] if argv else "runs/eval-fixtures")
    write_data(folder / "data")
    first, second = write_checkpoints(folder)
    print(f"try: python -m integrations.llava evaluate {first} {second} --tasks paper --data {folder / 'data'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
