"""The command line of training: recipe, data, output folder, overrides, dry run."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from integrations.llava.config import STAGES, Recipe, load_recipe, parse_overrides, recipe_names
from integrations.llava.dry_run import GPUS, dry_run, render
from integrations.llava.training import (
    RANDOM,
    NonFiniteLossError,
    ProcessFailedError,
    RunFolder,
    RunInterrupted,
    Score,
    default_stages,
    train,
)
from layerfuse.errors import InputError, UserError

from .options import CommandParser, quiet_bars, refuse_near_options

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Train a recipe, or say what training it would take."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    quiet_bars()
    try:
        options = [name.replace("_", "-") for name in {*vars(arguments), "from"}]
        refuse_near_options(rest, options, known=[field.name for field in dataclasses.fields(Recipe)])
        recipe, stages, output = _asked(arguments, parse_overrides(rest))
        if arguments.dry_run:
            print(render(dry_run(recipe, gpu=arguments.gpu, stages=stages)))
            return 0
        train(
            recipe,
            output,
            stages=stages,
            adapter=arguments.adapter,
            overwrite=arguments.overwrite,
            scores=_scores(arguments),
        )
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
    parser = CommandParser(
        prog="python -m integrations.llava train",
        description="Train a recipe. Every value of it can be overridden: --finetune.learning_rate 2e-5. A run that "
        "was interrupted goes on when the same command is started again.",
        epilog=f"recipes: {', '.join(recipe_names())}",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--recipe", help="name of a recipe, or a YAML file; with --from, the settings of its stages count")
    add(
        "--from",
        dest="checkpoint",
        metavar="MODEL",
        help="folder of a model to go on from: a finished run, or a checkpoint of any layout that convert reads",
    )
    add("--output", help="folder of the run (default: runs/RECIPE, or runs/from_MODEL)")
    add(
        "--data",
        nargs="+",
        help="samples in any form of docs/data.md: for both stages one source, or one each; for one stage, several are "
        "mixed, and a.json:0.5 is a share",
    )
    add("--image-folder", nargs="+", help="folder of the images: one for all stages, or one a stage")
    add("--bad-samples", choices=("fail", "skip"), help="stop at samples that cannot be used, or leave them out")
    add("--max-samples", type=int, metavar="N", help="train on N samples a stage, spread evenly over its data")
    _add_evaluation_options(parser)
    add(
        "--stages",
        nargs="+",
        choices=STAGES,
        help="stages to run, in their order (default: both, or finetune with --from)",
    )
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
    add("--gpu", type=str.lower, choices=GPUS, default="h100", help="the GPU a dry run reckons with (default: h100)")
    add(
        "--overwrite",
        action="store_true",
        help="train the stages asked for anew, once the first step is made, and remove what the folder holds of them; "
        "other stages stay",
    )
    return parser


def _asked(arguments: argparse.Namespace, overrides: Mapping[str, Any]) -> tuple[Recipe, Sequence[str], str]:
    """What is trained, which stages of it, and where; what is not said, the run's own folder may say."""
    recipe, checkpoint = arguments.recipe, arguments.checkpoint
    if arguments.output and not checkpoint:
        folder = RunFolder(arguments.output)
        if recipe is None and folder.recipe_file.is_file():
            recipe = folder.recipe_file
        elif not arguments.overwrite:
            checkpoint = (folder.checkpoint_of_run() or (None,))[0]
    if not (recipe or checkpoint):
        raise InputError(
            "nothing says what to train; name a recipe (--recipe), a model to go on from (--from), or the folder of a "
            "run that was begun (--output)."
        )
    start = {"model.checkpoint": checkpoint} if checkpoint else {}
    plain = load_recipe(recipe, start)
    start_name = Path(plain.model.checkpoint).resolve().name
    output = arguments.output or f"runs/{f'from_{start_name}' if plain.model.checkpoint else plain.name}"
    stages = arguments.stages or default_stages(plain, RunFolder(output))
    return load_recipe(recipe, {**start, **_data_overrides(arguments, stages), **overrides}), stages, output


def _add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a stage is measured on while it trains."""
    add = parser.add_argument_group("evaluation while training").add_argument
    add("--eval-data", nargs="+", metavar="FILE", help="held-out samples, in the forms of --data")
    add("--eval-image-folder", nargs="+", metavar="DIR", help="folder of their images (default: that of the data)")
    add("--eval-every", type=int, metavar="STEPS", help="steps between evaluations (default: a tenth of a stage's)")
    add("--eval-task", metavar="NAME", help="a task whose score is measured, too, in stages that ask questions")
    add("--eval-task-data", metavar="DIR", help="folder of its questions and images, as of evaluate --task")


def _scores(arguments: argparse.Namespace) -> list[Score]:
    if (arguments.eval_task is None) != (arguments.eval_task_data is None):
        raise InputError("--eval-task NAME and --eval-task-data DIR go together; give both, or none.")
    if arguments.eval_task is None:
        return []
    from .task_score import task_score  # brings all tasks, which training does not need

    return [task_score(arguments.eval_task, arguments.eval_task_data)]


def _data_overrides(arguments: argparse.Namespace, asked: Sequence[str]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    stages = list(dict.fromkeys(asked))
    options = {
        "data": "data.path",
        "image_folder": "data.image_folder",
        "eval_data": "validation.path",
        "eval_image_folder": "validation.image_folder",
    }
    for option, key in options.items():
        values = getattr(arguments, option) or []
        _refuse_settings(option, values)
        if option in ("data", "eval_data") and len(stages) == 1 and len(values) > 1:
            values = [values]
        if len(values) == 1:
            values = values * len(stages)
        if len(values) not in (0, len(stages)):
            raise InputError(
                f"--{option.replace('_', '-')} names {len(values)} paths for the stages {', '.join(stages)}; "
                "give one for all, or one each."
            )
        for stage, value in zip(stages, values, strict=False):
            overrides[f"{stage}.{key}"] = value
    if arguments.eval_every is not None:
        overrides |= {f"{stage}.validation.every": arguments.eval_every for stage in stages}
    for option in ("bad_samples", "max_samples"):
        if (given := getattr(arguments, option)) is not None:
            overrides |= {f"{stage}.data.{option}": given for stage in stages}
    return overrides


def _refuse_settings(option: str, values: Sequence[str]) -> None:
    """Refuse a setting that stands where paths are listed."""
    for value in values:
        key, equals, given = value.partition("=")
        if equals and not Path(value).exists():
            raise InputError(
                f"--{option.replace('_', '-')} names {value!r}, which is no path; a setting has two dashes in front: "
                f"--finetune.{key} {given} (or, for all stages, --bad-samples skip, --max-samples 100)."
            )
