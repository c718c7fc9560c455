"""What callers ask of a backbone, be it one or several side by side: layers, widths, grids, images, switches."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from functools import reduce
from typing import Any, TypeVar

import torch
from torch import nn

from layerfuse.errors import InputError
from layerfuse.features import Grid
from layerfuse.preprocessing import AnyPreprocessing, Images, PatchBatch, holds_patches, patch_batch

__all__ = ["AnyBackbone"]

_B = TypeVar("_B", bound="AnyBackbone")


class AnyBackbone(nn.Module, abc.ABC):
    """One backbone or several side by side: the base class of `Backbone` and `BackboneGroup`.

    Attributes:
        layers: number (>= 0) of each map's layer, in the order of the maps.
        image_size: (height, width) of the images, in pixels, as `prepare` makes them.
        in_channels: of the images.
        preprocessing: of pictures, which makes such images; may be replaced.
    """

    layers: tuple[int, ...]
    image_size: tuple[int, int]
    in_channels: int
    preprocessing: AnyPreprocessing
    _frozen: bool = False

    @property
    @abc.abstractmethod
    def members(self) -> tuple[Any, ...]:
        """The backbones, each a `Backbone`; ``FeatureMaps.sources`` are positions among them."""

    @property
    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON-able description from which `layerfuse.backbones.backbone_from_config` builds the same architecture."""

    @abc.abstractmethod
    def grids(self, size: int | Sequence[int] | None = None) -> tuple[Grid, ...]:
        """Return the grids (H, W) of all maps, in patches, of images of a size in pixels; of the native one if None."""

    @abc.abstractmethod
    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them."""

    @property
    @abc.abstractmethod
    def map_channels(self) -> tuple[int, ...]:
        """Width C_l of each map."""

    @property
    @abc.abstractmethod
    def strides(self) -> tuple[tuple[int, int], ...]:
        """The (height, width) of a cell of each map, in pixels of the image that its backbone sees."""

    @property
    def fuser_channels(self) -> int | list[int]:
        """The widths as a fuser's ``in_channels`` are written: one number if all maps share it, else one per map."""
        widths = list(self.map_channels)
        return widths[0] if len(set(widths)) == 1 else widths

    @property
    def taps(self) -> tuple[tuple[int, int], ...]:
        """Of each map the position of its backbone among `members`, and its layer."""
        return tuple((source, layer) for source, member in enumerate(self.members) for layer in member.layers)

    def maps(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the L tapped maps of images with their grids unfolded, each (B, C_l, H_l, W_l); see `forward`.

        Raises:
            ValueError: as `forward`, and of patches, whose pictures have grids of their own.
        """
        if holds_patches(images):
            raise InputError(
                "maps are of images of one size; of patches unfold each: [f.nchw(0) for f in backbone(…)]."
            )
        features = self(images)
        return tuple([features.nchw(index) for index in range(len(features))])

    def prepare(self, images: Images) -> torch.Tensor:
        """Return a batch (B, in_channels, height, width) of one picture or several, on the device and in the dtype.

        Raises:
            TypeError: if one is no picture, see `Preprocessing.batch`.
            ValueError: if there is none, or one has values or a shape that cannot be.
        """
        self._check_channels()
        return self.preprocessing.batch(images).to(self.device, self.dtype)

    def _check_channels(self) -> None:
        if self.preprocessing.channels != self.in_channels:
            raise InputError(
                f"this backbone takes images of {self.in_channels} channels, and its preprocessing is of "
                f"{self.preprocessing.channels}. Say theirs: backbone.preprocessing = dataclasses.replace(backbone."
                f"preprocessing, mean=…, std=…), {self.in_channels} numbers each, for values in [0, 1]; then give "
                f"uint8 arrays (height, width, {self.in_channels}). Or normalise tensors yourself."
            )

    def prepare_patches(self, images: Images, *, max_num_patches: int | None = None) -> PatchBatch:
        """Return pictures as patches, each in its own aspect ratio, on the device and in the dtype; for NaFlex models.

        They are scaled as SigLIP 2's processor does it: to the largest grid of the picture's aspect ratio that holds at
        most ``max_num_patches``, those of the native size if None; and padded to that number.

        Raises:
            TypeError: if one is no picture, see `Preprocessing.batch`.
            ValueError: if there is none, one has values that cannot be, or the model takes no patches.
        """
        first, alone = self.members[0], self.members[0] is self
        if not alone or first.patch_layout is None:
            what = type(first.model).__name__ if alone else "a group of backbones"
            raise InputError(f"{what} takes images of one size and no patches; make them with prepare(pictures).")
        self._check_channels()
        rows, columns = first.grid(*first.image_size)
        batch = patch_batch(
            first.preprocessing,
            images,
            patch_size=first.patch_size,
            layout=first.patch_layout,
            max_num_patches=rows * columns if max_num_patches is None else max_num_patches,
        )
        return batch.to(self.device, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that images are to have."""
        return reduce(torch.promote_types, [member.dtype for member in self.members])

    @property
    def device(self) -> torch.device:
        """The device of the first weight."""
        return next((weight.device for weight in self.parameters()), torch.device("cpu"))

    def freeze(self: _B) -> _B:
        """Turn gradients off for every parameter and stay in evaluation mode, whatever ``train()`` is called later.

        Returns the same object.
        """
        self._frozen = True
        self.requires_grad_(False)
        return self.eval()

    def train(self: _B, mode: bool = True) -> _B:
        """Set the training mode, unless it is frozen."""
        super().train(mode and not self._frozen)
        return self
