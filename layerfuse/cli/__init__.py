"""The command `layerfuse`: one file for each of its commands, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from layerfuse.errors import UserError

__all__ = ["main"]

# Command -> (module, what it does). Each module has `main(argv)`.
_COMMANDS = {
    "models": ("layerfuse.cli.models", "list backbones by name: layerfuse models 'timm:*clip*336*'"),
    "inspect": ("layerfuse.cli.inspect", "depth, width, grid of a backbone, and what fusers cost on it"),
    "similarity": ("layerfuse.cli.similarity", "how alike layers are, of one backbone or of two"),
    "maps": ("layerfuse.cli.maps", "maps of layers and fusers, beside and over pictures"),
    "contributions": ("layerfuse.cli.contributions", "what each layer contributes to the tokens of a trained encoder"),
    "probe": ("layerfuse.cli.probe", "what each layer tells about the pictures of a folder"),
    "suggest": ("layerfuse.cli.suggest", "which layers to tap for the pictures of a folder, and how sure that is"),
    "extract": ("layerfuse.cli.extract", "feature maps of a folder of pictures, into a store on disk"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the rest of the arguments is the command's own."""
    parser = argparse.ArgumentParser(
        prog="layerfuse",
        description="Look at backbones and their layers.",
        epilog="commands:\n" + "\n".join(f"  {name:<15}{what}" for name, (_, what) in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_COMMANDS, metavar="command", help="one of those below; each knows --help")
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_args(arguments[:1]).command
    module = importlib.import_module(_COMMANDS[command][0])
    try:
        module.main(arguments[1:])
    except UserError as error:
        print(f"layerfuse {command}: {error}", file=sys.stderr)
        return 2
    return 0
