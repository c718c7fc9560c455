"""From pictures of any kind to the tensors that backbones were pretrained on."""

from __future__ import annotations

from layerfuse.preprocessing.naflex import PatchBatch, PatchLayout, holds_patches, patch_batch
from layerfuse.preprocessing.pixels import Images
from layerfuse.preprocessing.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Geometry,
    Interpolation,
    Mode,
    Preprocessing,
    interpolation_name,
)
from layerfuse.preprocessing.stacked import AnyPreprocessing, StackedPreprocessing, preprocessing_from_dict
from layerfuse.preprocessing.tiles import prepare_tiles, tile_pixels

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "AnyPreprocessing",
    "Geometry",
    "Images",
    "Interpolation",
    "Mode",
    "PatchBatch",
    "PatchLayout",
    "Preprocessing",
    "StackedPreprocessing",
    "holds_patches",
    "interpolation_name",
    "patch_batch",
    "prepare_tiles",
    "preprocessing_from_dict",
    "tile_pixels",
]
