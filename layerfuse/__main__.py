"""`python -m layerfuse`: the command `layerfuse`."""

from __future__ import annotations

import sys

from layerfuse.cli import main

if __name__ == "__main__":
    sys.exit(main())
