"""All CPU rows and the verdict on each goal: python -m benchmarks.cpu [--quick] [--only op] [--json out.json]."""

from __future__ import annotations

from benchmarks.command import main

if __name__ == "__main__":
    main(goals_of="cpu")
