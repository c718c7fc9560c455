"""The command line of training: recipe, data, output folder, overrides, dry run."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch

from integrations.llava.config import STAGES, load_recipe, parse_overrides, recipe_names
from integrations.llava.dry_run import GPUS, dry_run, render
from integrations.llava.training import RANDOM, NonFiniteLossError, ProcessFailedError, RunInterrupted, train
from layerfuse.errors import InputError, UserError

from .options import quiet_bars

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Train a recipe, or say what training it would take."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_bars()
    try:
        overrides = _data_overrides(arguments) | parse_overrides(rest)
        recipe = load_recipe(arguments.recipe, overrides)
        if arguments.dry_run:
            print(render(dry_run(recipe, gpu=arguments.gpu, stages=arguments.stages)))
            return 0
        output = arguments.output or f"runs/{recipe.name}"
        train(recipe, output, stages=arguments.stages, adapter=arguments.adapter, overwrite=arguments.overwrite)
    except UserError as error:
        # Where another process found it, that is the cause.
        failed = getattr(error.__cause__, "process", None)
        print(f"{parser.prog}: {'' if failed is None else f'process {failed}: '}{error}", file=sys.stderr)
        return 2
    except (NonFiniteLossError, ProcessFailedError) as error:
        # Not to be requeued: the same step would break again.
        print(error, file=sys.stderr)
        return 1
    except RunInterrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    print(f"run: {output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m integrations.llava train",
        description="Train a recipe. Every value of it can be overridden: --finetune.learning_rate 2e-5. A run that "
        "was interrupted goes on when the same command is started again.",
        epilog=f"recipes: {', '.join(recipe_names())}",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--recipe", required=True, help="name of a recipe, or a YAML file")
    add("--output", help="folder of the run (default: runs/RECIPE)")
    add("--data", nargs="+", help="LLaVA json or jsonl: one file for all stages, or one a stage")
    add("--image-folder", nargs="+", help="folder of the images: one for all stages, or one a stage")
    add("--stages", nargs="+", choices=STAGES, default=STAGES, help="stages to run, in their order (default: both)")
    add(
        "--adapter",
        help="fuser and projector to start from: RUN/pretrain/adapter.safetensors, the published mm_projector.bin, or "
        f"{RANDOM!r} for new ones",
    )
    add(
        "--dry-run",
        action="store_true",
        help="say what the run would take and what is wrong with its data; train nothing",
    )
    add("--gpu", choices=GPUS, default="h100", help="the GPU a dry run reckons with (default: h100)")
    add(
        "--overwrite",
        action="store_true",
        help="train the stages asked for anew, once the first step is made, and remove what the folder holds of them; "
        "other stages stay",
    )
    return parser


def _data_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    overrides = {}
    stages = list(dict.fromkeys(arguments.stages))
    for option, key in (("data", "path"), ("image_folder", "image_folder")):
        values = getattr(arguments, option) or []
        if len(values) == 1:
            values = values * len(stages)
        if len(values) not in (0, len(stages)):
            raise InputError(
                f"--{option.replace('_', '-')} names {len(values)} paths for the stages {', '.join(stages)}; "
                "give one for all, or one each."
            )
        for stage, value in zip(stages, values, strict=False):
            overrides[f"{stage}.data.{key}"] = value
    return overrides
