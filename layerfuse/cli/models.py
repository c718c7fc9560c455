"""The command that lists backbones by name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from layerfuse.backbones import BACKBONES, list_backbones
from layerfuse.errors import InputError

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
    found = list_backbones(family, name)
    if not found:
        raise InputError(
            f"no name is like {pattern!r}; write * for what may come before and behind, in quotes, such as "
            f"'*{name.strip('*')}*', or less of the name."
        )
    print("\n".join(found))
