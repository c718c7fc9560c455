"""Backbones and encoders as libraries for segmentation and detection want theirs; neither library is imported here.

segmentation_models_pytorch: `SegmentationEncoder` keeps the contract of its encoders and registers as one of them;
`ViTEncoder` that of the encoder of its DPT. torchvision: `DetectionBackbone` is a backbone of `FasterRCNN`, `MaskRCNN`,
`RetinaNet` and `FCOS`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from layerfuse.backbones import Backbone
from layerfuse.encoder import FusedEncoder
from layerfuse.errors import InputError
from layerfuse.pyramid import STRIDES, PyramidEncoder

__all__ = ["DetectionBackbone", "SegmentationEncoder", "ViTEncoder"]

_MAX_DEPTH = 5


class SegmentationEncoder(nn.Module):
    """An encoder of segmentation_models_pytorch: maps of strides 1, 2, 4, … 2^depth, from fine to coarse.

    Stride 1 is the image, stride 2 a map without channels, as of the library's other transformers; the rest comes from
    a `PyramidEncoder`. Registered under a name of your choice, all of its models take it::

        smp.encoders.encoders["mine"] = {
            "encoder": SegmentationEncoder, "pretrained_settings": {}, "params": {"encoder": encoder}
        }
        model = smp.Unet("mine", encoder_weights=None, classes=3)

    Each model gets a copy of the encoder, weights and all.

    Args:
        encoder: a backbone that taps one layer, or as many as there are strides from 4 on (four for depth 5); or a
            `FusedEncoder`.
        depth: 2 to 5; the coarsest stride is 2^depth.
        output_stride: the coarsest stride that is allowed, 8 or 16 for DeepLab; coarser maps come with it.
        width: channels of each map by a `FeaturePyramid`; None for maps that are only resampled, with their own.

    Attributes:
        out_channels: of each map, a list.
        output_stride: the coarsest stride, in pixels.

    Raises:
        ValueError: if the depth cannot be, or as `PyramidEncoder`.
    """

    # What the library asks of an encoder that it exports.
    _is_torch_scriptable = False
    _is_torch_exportable = True
    _is_torch_compilable = True

    def __init__(
        self, encoder: Backbone | FusedEncoder, depth: int = 5, output_stride: int = 32, width: int | None = 256
    ) -> None:
        super().__init__()
        if not 2 <= depth <= _MAX_DEPTH:
            raise InputError(f"depth is {depth}; a SegmentationEncoder has maps of strides up to 2^2 … 2^{_MAX_DEPTH}.")
        self.output_stride = min(output_stride, 2**depth)
        strides = [min(stride, output_stride) for stride in STRIDES[: depth - 1]]
        self.levels = PyramidEncoder(encoder, strides=strides, out_channels=width)
        self.out_channels = [self.levels.in_channels, 0, *self.levels.channels]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the maps of (B, channels, height, width) images, (B, C, ceil(height / s), ceil(width / s)) each."""
        batch_size, _, height, width = images.shape
        half = images.new_empty(batch_size, 0, -(-height // 2), -(-width // 2))
        return [images, half, *self.levels(images)]

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Check the number of channels that the library was told; a ValueError says how to have others."""
        if in_channels != self.levels.in_channels:
            raise InputError(
                f"the model is to take images of {in_channels} channels, and its encoder takes "
                f"{self.levels.in_channels}; give in_channels={self.levels.in_channels}, or build the backbone for "
                "others, as with timm's in_chans."
            )

    def make_dilated(self, output_stride: int) -> None:
        """Do nothing: the library asks for this once the encoder is built, and it was built for that stride."""


class ViTEncoder(nn.Module):
    """The encoder of segmentation_models_pytorch's DPT: tapped maps on their own grid, with their prefix tokens.

    Its `DPTDecoder` takes ``out_channels``, ``output_strides`` and ``has_prefix_tokens``.

    Args:
        backbone: taps as many layers as the decoder has stages, four as published (arXiv:2103.13413).

    Raises:
        ValueError: if cells are not square, since the decoder knows one stride for both edges.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        for height, width in backbone.strides:
            if height != width:
                raise InputError(f"patches are {height}x{width} pixels, and DPT's decoder knows square ones only.")
        self.backbone = backbone
        self.out_channels = list(backbone.map_channels)
        self.output_strides = [height for height, _ in backbone.strides]
        self.output_stride = max(self.output_strides)
        self.has_prefix_tokens = backbone.num_prefix_tokens > 0

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], Sequence[torch.Tensor | None]]:
        """Return L maps (B, C, H, W) of images, and their prefix tokens (B, P, C), or None where there are none."""
        features = self.backbone(images)
        maps = [features.nchw(index) for index in range(len(features))]
        return maps, list(features.prefix) or [None] * len(maps)


class DetectionBackbone(nn.Module):
    """A backbone of torchvision's detectors: maps "0" to "3" of strides 4, 8, 16 and 32, and "pool" of stride 64.

    `FasterRCNN` takes it with its own anchors and pooling. Every second cell of the last map makes "pool", as in
    ViTDet and in torchvision's pyramids. Detectors resize images to what they like: for a backbone of one size, give
    ``fixed_size=(width, height)`` of it, and ``size_divisible=1``; for one of any size ``size_divisible`` its patch
    size.

    Args:
        encoder: a backbone that taps one layer or four, or a `FusedEncoder`.
        out_channels: of every map, by a `FeaturePyramid`.

    Raises:
        ValueError: as `PyramidEncoder`.
    """

    def __init__(self, encoder: Backbone | FusedEncoder, out_channels: int = 256) -> None:
        super().__init__()
        self.levels = PyramidEncoder(encoder, out_channels=out_channels)
        self.out_channels = out_channels

    def forward(self, images: torch.Tensor) -> OrderedDict[str, torch.Tensor]:
        """Return the maps of images by their names, (B, out_channels, ceil(height / s), ceil(width / s)) each."""
        maps = self.levels(images)
        named = OrderedDict((str(index), level) for index, level in enumerate(maps))
        named["pool"] = F.max_pool2d(maps[-1], 1, 2)
        return named
