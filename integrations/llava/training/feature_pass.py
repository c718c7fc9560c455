"""A stage's feature cache: opened, and filled with the maps of the stage's images that are not there yet.

They are computed before the first step, by all processes together, as the training would: in its precision, on its
device. So an engine that takes the model apart never has to encode an image in one process and not in another.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn

from integrations.llava.config import StageConfig
from integrations.llava.data import (
    ConversationDataset,
    FeatureCache,
    UncachedImage,
    open_feature_cache,
    prepare_uncached,
    tile_bytes,
    uncached_images,
)
from integrations.llava.modeling import FusedLlavaForConditionalGeneration, image_maps
from layerfuse.files import check_disk_space

from .distributed import any_process

__all__ = ["fill_feature_cache"]

_log = logging.getLogger(__name__)


def fill_feature_cache(
    model: FusedLlavaForConditionalGeneration, dataset: ConversationDataset, config: StageConfig
) -> None:
    """Give a data set the cache of its stage, and encode the images that it lacks; every process has to call this.

    Args:
        model: not yet wrapped by an engine; its backbone is frozen.
        dataset: of the stage.
        config: of the stage, names the cache's folder.

    Raises:
        OSError: before the first image is encoded, if the disk has no room for all; or if nothing can be written.
    """
    process, tower = PartialState(), model.model.vision_tower
    folder, stored, bf16 = Path(config.feature_cache), config.feature_cache_dtype, config.precision == "bf16"
    dataset.cache = open_feature_cache(
        folder,
        tower.backbone,
        dataset.preprocessing,
        dataset.layout,
        stored=stored,
        computed={"device": process.device.type, "autocast": bf16},
    )
    share = process.process_index, process.num_processes
    missing, count = uncached_images(dataset, share=share, workers=config.num_workers)
    found = gather_object([(len(missing), sum(missing.values()))])
    lacking, tiles = (sum(each) for each in zip(*found, strict=True))
    needed = tiles * tile_bytes(tower.backbone, stored)
    _log.info("feature cache %s lacks %d of %d images: %.3f GiB", folder, lacking, count, needed / 2**30)
    check_disk_space(folder, needed, f"the feature cache, {lacking:,} images,")
    tower.to(process.device)
    size, _ = config.batches(process.num_processes)
    with torch.inference_mode(), torch.autocast(process.device.type, torch.bfloat16, enabled=bf16):
        for images in prepare_uncached(dataset, list(missing), size=size, workers=config.num_workers):
            _encode(tower, images, dataset.cache, process.device)
    # Engines move the model themselves, or build on what lies on the CPU.
    tower.to("cpu")
    any_process(False)  # all have written


def _encode(tower: nn.Module, images: Sequence[UncachedImage], cache: FeatureCache, device: torch.device) -> None:
    features = image_maps(tower, torch.cat([pixels for _, pixels, _ in images]).to(device)).to("cpu")
    start = 0
    for digest, pixels, size in images:
        own = features.map(partial(torch.narrow, dim=0, start=start, length=len(pixels)))
        cache.write(digest, own, size)
        start += len(pixels)
