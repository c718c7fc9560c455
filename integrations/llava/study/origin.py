"""Origin of a study's numbers: command, commit, hardware, versions, date; sizes of data and model."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from integrations.llava._files import json_lines
from integrations.llava.config import STAGES, Recipe
from integrations.llava.modeling import FusedLlavaForConditionalGeneration
from layerfuse import __version__
from layerfuse.errors import MissingFileError

from .grid import DemoSettings
from .results import FuserRun

__all__ = ["describe_origin", "describe_redrawing", "describe_sizes"]


def describe_sizes(
    settings: DemoSettings, recipe: Recipe, run: FuserRun, model: FusedLlavaForConditionalGeneration
) -> dict[str, str]:
    """Label -> value: sizes of the data, of the training and of a model."""
    steps = [len(run.losses.get(stage, ())) for stage in STAGES]
    (backbone,) = model.model.vision_tower.backbone.members
    return {
        "training images": f"{settings.num_train:,}",
        "test images": f"{settings.num_test:,} ({len(run.answers):,} questions)",
        "steps": f"{steps[0]:,} pretrain + {steps[1]:,} finetune",
        "batch": f"{recipe.pretrain.batch_size} / {recipe.finetune.batch_size} images",
        "backbone": f"{backbone.num_blocks} blocks, width {backbone.embed_dim}, frozen",
        "whole model": f"{model.num_parameters() / 1e6:.1f} M parameters",
        "runs of each fuser": _seeds(settings.seeds),
    }


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"one seed: {seeds[0]}"
    return f"{len(seeds)} seeds: {', '.join(map(str, seeds))}"


def describe_origin(command: str) -> dict[str, str]:
    """Label -> value: command, commit, hardware, versions and date."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "none (not in a git checkout)"
    return {
        "command": command,
        "commit": commit,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu(),
        "versions": f"layerfuse {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def describe_redrawing(results: Path) -> dict[str, str]:
    """Origin of the numbers in an earlier ``results.jsonl``, and when and with which code they are drawn anew.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not results.is_file():
        raise MissingFileError(f"there is no {results}, so no finished study to draw anew; leave --redraw out.")
    drawn = describe_origin("")
    row = next(row for _, row in json_lines(results))
    return {**{key: row[key] for key in drawn}, "drawn anew": f"commit {drawn['commit']}, {drawn['date']}"}


def _cpu() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{cores} CPU cores ({name}), {torch.get_num_threads()} torch threads"
