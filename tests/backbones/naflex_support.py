"""Tiny NaFlex models, pictures of several shapes, and the batches that the libraries make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.transforms_factory import transforms_imagenet_eval
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

import layerfuse
from layerfuse.backbones import Backbone
from layerfuse.preprocessing import PatchBatch
from layerfuse.testing import randomise_parameters
from tests.backbones.zoo import CASES, NUM_BLOCKS, timm_model

LAYERS = (0, 1, NUM_BLOCKS)
NUM_PATCHES = 20
# Grids of (3, 6), (4, 4), (10, 2), (6, 3) and (4, 4) patches of 16 pixels.
SIZES = ((50, 90), (64, 64), (200, 31), (90, 50), (64, 64))
GRIDS = ((3, 6), (4, 4), (10, 2), (6, 3), (4, 4))

MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    case.family: case.build for case in CASES if case.name == "siglip2_naflex"
}
MODELS["timm class token, registers"] = timm_model("naflexvit_so150m2_patch16_reg1_gap", class_token=True)
MODELS["timm factorized"] = timm_model("naflexvit_base_patch16_parfac_gap")
MODELS["timm radio"] = timm_model("naflexvit_base_patch16_radio_v3")
MODELS["timm rope"] = timm_model("naflexvit_base_patch16_gap", rope_type="axial", pos_embed="none")
MODELS["timm mixed rope"] = timm_model("naflexvit_base_patch16_gap", rope_type="mixed", pos_embed="learned")
MODELS["timm channels first"] = timm_model("naflexvit_base_patch16_gap", patchify_channels_last=False)


def pictures() -> list[Image.Image]:
    values = np.random.default_rng(0)
    return [Image.fromarray(values.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in SIZES]


def build(kind: str) -> Any:
    torch.manual_seed(0)
    return randomise_parameters(MODELS[kind](), std=0.1).eval()


def tapped(kind: str) -> Backbone:
    return layerfuse.create_backbone(build(kind), layers=LAYERS)


def processed(backbone: Backbone) -> Mapping[str, Any]:
    """The batch that the library makes of the pictures: SigLIP 2's processor, or timm's transform and collator."""
    if backbone.family == "transformers":
        return Siglip2ImageProcessorPil(patch_size=16, max_num_patches=NUM_PATCHES)(pictures(), return_tensors="pt")
    transform = transforms_imagenet_eval(
        naflex=True,
        max_seq_len=NUM_PATCHES,
        interpolation=backbone.preprocessing.interpolation,
        mean=backbone.preprocessing.mean,
        std=backbone.preprocessing.std,
        patchify=True,
        patchify_channels_last=backbone.patch_layout == "height width channels",
    )
    return NaFlexCollator(NUM_PATCHES)([(transform(picture), 0) for picture in pictures()])[0]


def images_of(batch: PatchBatch, layout: str | None) -> list[torch.Tensor]:
    """Each picture as an image (1, 3, height, width)."""
    images = []
    for patches, (rows, columns) in zip(batch.patches, batch.grids, strict=True):
        values = patches[: rows * columns]
        if layout == "height width channels":
            unfolded = values.reshape(rows, columns, 16, 16, 3).permute(4, 0, 2, 1, 3)
        else:
            unfolded = values.reshape(rows, columns, 3, 16, 16).permute(2, 0, 3, 1, 4)
        images.append(unfolded.reshape(1, 3, rows * 16, columns * 16))
    return images
