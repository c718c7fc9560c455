"""`python -m integrations.llava COMMAND`: one command per job, each imported only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

# Command -> (module, what it does). Each module has `main(argv) -> exit code`.
_COMMANDS = {
    "train": ("integrations.llava.cli.train", "train a recipe: --recipe NAME --output FOLDER [--key value ...]"),
    "runs": ("integrations.llava.cli.runs", "say what is running, finished, stopped or failed, with its last loss"),
    "plot": ("integrations.llava.cli.plot", "draw the losses of several runs as a picture or a page"),
    "generate": ("integrations.llava.cli.generate", "answer questions about images with a trained model"),
    "chat": ("integrations.llava.cli.chat", "talk with a trained model about images, in the terminal"),
    "convert": ("integrations.llava.cli.convert", "bring a checkpoint into another layout; merge LoRA adapters"),
    "data": ("integrations.llava.cli.data", "check a data file and its images before training"),
    "evaluate": ("integrations.llava.cli.evaluate", "score a trained model"),
    "demo": ("integrations.llava.cli.demo", "make data, train several fusers, compare them, write a report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the rest of the arguments is the command's own."""
    parser = argparse.ArgumentParser(
        prog="python -m integrations.llava",
        description="MMFuser-LLaVA: train, answer, evaluate.",
        epilog="commands:\n" + "\n".join(f"  {name:<10}{what}" for name, (_, what) in _COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_COMMANDS, metavar="command", help="one of those below; each knows --help")
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Imported by peft whether it is needed or not, it speaks of kernels that nobody asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    command = parser.parse_args(arguments[:1]).command
    try:
        module = importlib.import_module(_COMMANDS[command][0])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(("integrations", "layerfuse")):
            raise
        parser.error(f"{command} needs the package {error.name!r}; install it with: pip install 'layerfuse[llava]'")
    result: int = module.main(arguments[1:])
    return result


if __name__ == "__main__":
    sys.exit(main())
