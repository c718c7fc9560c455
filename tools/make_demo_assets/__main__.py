"""The command line of `make assets`: the embedded backbone and language model, made anew from their recipes."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from integrations.llava.synthetic import BACKBONE_FOLDER
from layerfuse.errors import UserError

from .make import ASSETS, make_assets

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Make the assets."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_demo_assets",
        description="Pretrain the embedded backbone and language model; minutes to hours on 2 CPU cores.",
    )
    parser.add_argument("--output", type=Path, default=BACKBONE_FOLDER.parent, help="folder (default: the package's)")
    parser.add_argument("--parts", nargs="+", choices=ASSETS, default=ASSETS, help="what to make (default: both)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        made = make_assets(arguments.output, parts=arguments.parts)
    except UserError as error:
        parser.error(str(error))
    print(f"assets: {made}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
