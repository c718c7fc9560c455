"""Torch's compiler: whether it works here, and backbone and fuser compiled by it for a stage of training.

The language model stays as it is: its attention has kernels of its own, and its batches another length each step.
"""

from __future__ import annotations

import subprocess

import torch

from layerfuse.errors import InputError

from .model import FusedLlavaForConditionalGeneration

__all__ = ["check_compiler", "compile_vision"]

_BACKEND = "inductor"


def check_compiler(device: torch.device) -> None:
    """Compile something small for a device; a ValueError says what is missing where that is not possible."""
    numbers = torch.ones(8, device=device)
    try:
        torch.compile(lambda given: 2 * given + 1, backend=_BACKEND)(numbers)
    # What torch's compiler raises is a RuntimeError; what it calls may be missing or broken, too.
    except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).partition("\n\n")[0].split()) or type(error).__name__
        raise InputError(
            f"compile needs a compiler, and torch cannot use one for {device.type} here ({reason}); install it "
            "(for CPUs a C++ compiler such as g++, for GPUs Triton and a C compiler), or leave compile out."
        ) from error


def compile_vision(model: FusedLlavaForConditionalGeneration) -> None:
    """Let backbone and fuser be compiled when they are first called, in place: their weights keep their names."""
    backbone = model.model.vision_tower.backbone
    # An eager pass of one image first: it finds out what a backbone's blocks put out, which a compiled one takes for
    # granted. Dropout in it must not change what is drawn later.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        backbone(torch.zeros(1, backbone.in_channels, *backbone.image_size, device=backbone.device))
    # torch counts what it compiled of one function, an earlier stage's or run's included, and at its limit of eight
    # goes on without compiling.
    torch.compiler.reset()
    for part in (backbone, model.model.fuser):
        part.compile(backend=_BACKEND)
