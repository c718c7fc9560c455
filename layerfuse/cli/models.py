"""The command that lists backbones by name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from layerfuse.backbones import BACKBONES, list_backbones

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Print the names that `create_encoder` and the other commands take, one a line."""
    parser = argparse.ArgumentParser(
        prog="layerfuse models",
        description="List backbones, as far as they can be told offline: with weights for timm and open_clip, known "
        "model types for transformers, registered classes for module.",
        epilog=f"families: {', '.join(BACKBONES)}",
    )
    parser.add_argument(
        "pattern",
        nargs="?",
        default="*",
        help="of the name, with * and ?, in quotes: '*clip*', or with its family: 'timm:*clip*336*'",
    )
    pattern = parser.parse_args(argv).pattern
    family, _, name = pattern.partition(":") if ":" in pattern else (None, "", pattern)
    print("\n".join(list_backbones(family, name)))
