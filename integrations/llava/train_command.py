"""The command line of training: recipe, output folder, overrides."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from transformers.utils import logging as transformers_logging

from .config import STAGES
from .recipe_files import load_recipe, parse_overrides, recipe_names
from .train import train

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Train a recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m integrations.llava train",
        description="Train a recipe. Every value of it can be overridden: --finetune.learning_rate 2e-5",
        epilog=f"recipes: {', '.join(recipe_names())}",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", required=True, help="name of a recipe, or a YAML file")
    parser.add_argument("--output", required=True, help="folder of the run")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="stages to run (default: both)")
    parser.add_argument("--adapter", help="fuser and projector to start from: RUN/pretrain/adapter.safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in the folder")
    arguments, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        recipe = load_recipe(arguments.recipe, parse_overrides(rest))
        train(
            recipe,
            arguments.output,
            stages=arguments.stages,
            adapter=arguments.adapter,
            overwrite=arguments.overwrite,
        )
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    print(f"run: {arguments.output}")
    return 0
