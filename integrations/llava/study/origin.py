"""Origin of a study's numbers: command, commit, hardware, versions, date; sizes of data and model."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from integrations.llava.config import STAGES, Recipe
from integrations.llava.modeling import FusedLlavaForConditionalGeneration
from layerfuse import __version__

from .grid import DemoSettings
from .results import FuserRun

__all__ = ["describe_origin", "describe_sizes"]


def describe_sizes(
    settings: DemoSettings, recipe: Recipe, run: FuserRun, model: FusedLlavaForConditionalGeneration
) -> dict[str, str]:
    """Label -> value: sizes of the data, of the training and of a model."""
    steps = [len(run.losses.get(stage, ())) for stage in STAGES]
    backbone = model.model.vision_tower.backbone
    count = sum(parameter.numel() for parameter in model.parameters())
    questions = sum(scores.num_questions for scores in run.kinds.values())
    return {
        "training images": f"{settings.num_train:,}",
        "test images": f"{settings.num_test:,} ({questions:,} questions)",
        "steps": f"{steps[0]:,} pretrain + {steps[1]:,} finetune",
        "batch": f"{recipe.pretrain.batch_size} / {recipe.finetune.batch_size} images",
        "backbone": f"{backbone.num_blocks} blocks, width {backbone.embed_dim}, frozen",
        "whole model": f"{count / 1e6:.1f} M parameters",
        "seeds": ", ".join(map(str, settings.seeds)),
    }


def describe_origin(command: str) -> dict[str, str]:
    """Label -> value: command, commit, hardware, versions and date."""
    return {
        "command": command,
        "commit": _commit(),
        "hardware": _hardware(),
        "versions": f"layerfuse {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d"),
    }


def _commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none (not in a git checkout)"


def _hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} CPU cores ({_processor()}), {torch.get_num_threads()} torch threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
