"""The command of 0.1: says what took its place."""

import sys

sys.exit(
    "benchmarks/run.py is now: python -m benchmarks.cpu or python -m benchmarks.gpu (from the repository's root; "
    "--only op, --quick, --dry-run, --help)."
)
