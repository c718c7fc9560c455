"""The GPUs a dry run can be asked about: memory and dense bf16 speed, from the makers' data sheets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from layerfuse.errors import InputError
from layerfuse.registry import unknown_name_message

__all__ = ["GPUS", "Gpu", "get_gpu"]


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: what `--gpu` calls it.
        memory: GiB that a program finds, a little less than the number in the product's name.
        tflops: 10^12 floating point operations a second: matrix products in bf16 with float32 sums, not sparse.
        has_bf16: whether the hardware computes in bf16.
    """

    name: str
    memory: float
    tflops: float
    has_bf16: bool = True


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("b200", 178.0, 2250.0),
        Gpu("h200", 139.8, 989.0),
        Gpu("h100", 79.2, 989.0),
        Gpu("mi300x", 191.0, 1307.0),
        Gpu("a100-80", 79.2, 312.0),
        Gpu("a100-40", 39.4, 312.0),
        Gpu("l40s", 44.5, 362.0),
        Gpu("a6000", 47.5, 155.0),
        Gpu("rtx5090", 31.4, 210.0),
        Gpu("rtx4090", 23.5, 165.0),
        Gpu("rtx3090", 23.6, 71.0),
        Gpu("v100-32", 31.7, 125.0, has_bf16=False),
    )
}
"""Name -> GPU."""


def get_gpu(name: str) -> Gpu:
    """Look a GPU up; a ValueError with the nearest match and the full list if it is not known."""
    if name not in GPUS:
        raise InputError(unknown_name_message("GPU", name, GPUS))
    return GPUS[name]
