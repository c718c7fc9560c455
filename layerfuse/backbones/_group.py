"""Several backbones side by side: one picture in, the maps of all of them out, on one grid if that is wanted.

Every backbone sees the picture as its own preprocessing makes it. The pictures lie on one another along the channels of
one tensor, as in OpenVLA (arXiv:2406.09246), so that whatever handles images handles these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import nn

from layerfuse.backbones._any_backbone import AnyBackbone
from layerfuse.backbones._image_checks import check_images
from layerfuse.backbones.base import BACKBONES, Backbone, as_pair
from layerfuse.errors import InputError, InvalidTypeError
from layerfuse.features import RESAMPLING, FeatureMaps, Grid, as_grid
from layerfuse.preprocessing import AnyPreprocessing, StackedPreprocessing
from layerfuse.registry import unknown_name_message

__all__ = ["BackboneGroup"]

_T = TypeVar("_T")
_KEYS = {"backbones", "resample", "grid", "order"}


class BackboneGroup(AnyBackbone):
    """Backbones side by side; their maps come one backbone after the other, `FeatureMaps.sources` says of which.

    Images are one tensor (B, channels of all backbones, height, width), height and width the largest of the backbones'
    own. Each backbone reads its channels, and of these the top left corner of its own size. Images of another size are
    given to every backbone as they are.

    Args:
        backbones: in the order of their channels and maps.
        resample: ``"bilinear"`` as in Eagle (arXiv:2408.15998), ``"bicubic"`` or ``"nearest"`` brings all maps to one
            grid, see `FeatureMaps.resample`; with None each keeps its own.
        grid: (H, W) of that grid, in patches; if None, that of the first backbone.
        order: in which the maps come, if not one backbone after the other: their positions if they did.

    Raises:
        ValueError: if there is no backbone, one is given twice, or ``resample``, ``grid`` or ``order`` cannot be.
        TypeError: if they are no list of `Backbone`.
    """

    def __init__(
        self,
        backbones: Sequence[Backbone],
        *,
        resample: str | None = "bilinear",
        grid: Sequence[int] | None = None,
        order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        backbones = _as_backbones(backbones)
        if len({id(backbone.model) for backbone in backbones}) < len(backbones):
            raise InputError("a group was given one model twice; copy it (copy.deepcopy), or tap more of its layers.")
        if resample is not None and resample not in tuple(RESAMPLING):
            raise InputError(unknown_name_message("resample", resample, RESAMPLING))
        self.backbones = nn.ModuleList(backbones)
        self.resample = resample
        self.grid = _as_grid(grid, resample)
        self.order = _as_order(order, sum(len(backbone.layers) for backbone in backbones))
        self.layers = self._in_order([backbone.layers for backbone in backbones])
        self.in_channels = sum(backbone.in_channels for backbone in backbones)
        heights, widths = zip(*(backbone.image_size for backbone in backbones), strict=True)
        self.image_size = (max(heights), max(widths))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BackboneGroup:
        """Build the architecture of another group's ``config``, with random weights; nothing is downloaded.

        Raises:
            ValueError: if a key is unknown or missing.
        """
        if set(config) != _KEYS:
            raise InputError(
                f"the config of several backbones has the keys {', '.join(sorted(_KEYS))}; this one has "
                f"{', '.join(sorted(config)) or 'none'}."
            )
        listed = config["backbones"]
        if not isinstance(listed, (list, tuple)) or not all(
            isinstance(each, Mapping) and "family" in each for each in listed
        ):
            raise InputError(
                f"the config of several backbones has for 'backbones' {listed!r:.80}; give a list with the config of "
                "each, as Backbone.config makes it, with its 'family'. Groups do not hold groups."
            )
        backbones = [BACKBONES.get(each["family"]).from_config(each) for each in listed]
        return cls(backbones, resample=config["resample"], grid=config["grid"], order=config["order"])

    @property
    def config(self) -> dict[str, Any]:
        """JSON-able description from which `from_config` builds the same architecture.

        Raises:
            ValueError: if a backbone has none, see `Backbone.config`.
        """
        grid, order = (None if each is None else list(each) for each in (self.grid, self.order))
        backbones = [member.config for member in self.members]
        return {"backbones": backbones, "resample": self.resample, "grid": grid, "order": order}

    @property
    def members(self) -> tuple[Backbone, ...]:
        """The backbones, in the order of their channels and maps."""
        return tuple(self.backbones)  # type: ignore[arg-type]  # a ModuleList forgets what it holds

    @property
    def taps(self) -> tuple[tuple[int, int], ...]:
        """Of each map the position of its backbone among `members`, and its layer."""
        return self._in_order(
            [[(source, layer) for layer in member.layers] for source, member in enumerate(self.members)]
        )

    @property
    def map_channels(self) -> tuple[int, ...]:
        """Width C_l of each map."""
        return self._in_order([member.map_channels for member in self.members])

    @property
    def strides(self) -> tuple[tuple[int, int], ...]:
        """The (height, width) of a cell of each map, in pixels of the image that its backbone sees.

        Of a map that was resampled, rounded to whole pixels.
        """
        if self.resample is None:
            return self._in_order([member.strides for member in self.members])
        grid = self.grids()[0]
        sizes = [member.image_size for member in self.members]
        cells = [(max(1, round(height / grid[0])), max(1, round(width / grid[1]))) for height, width in sizes]
        return self._in_order([[cell] * len(member.layers) for cell, member in zip(cells, self.members, strict=True)])

    @property
    def preprocessing(self) -> AnyPreprocessing:  # type: ignore[override]  # an attribute of the base class
        """The preprocessing of each backbone, whose results lie on one another; may be replaced."""
        return StackedPreprocessing(tuple(member.preprocessing for member in self.members))

    @preprocessing.setter
    def preprocessing(self, preprocessing: AnyPreprocessing) -> None:
        if not isinstance(preprocessing, StackedPreprocessing) or len(preprocessing.parts) != len(self.members):
            raise InputError(
                f"the preprocessing of {len(self.members)} backbones is a StackedPreprocessing of as many parts; got "
                f"{preprocessing}."
            )
        for member, own in zip(self.members, preprocessing.parts, strict=True):
            member.preprocessing = own

    def forward(self, images: torch.Tensor | Sequence[torch.Tensor]) -> FeatureMaps:
        """Encode images as the feature maps of all backbones.

        Args:
            images: (B, in_channels, height, width), prepared as ``preprocessing`` does it; or one tensor for each
                backbone, as that backbone takes it alone.

        Returns:
            L maps, each (B, N_l, C_l), with ``sources``. Where some backbones have prefix tokens, the others have none:
            (B, 0, C_l).

        Raises:
            ValueError: if the images have a shape or size that a backbone cannot take.
            TypeError: if they are no tensors.
        """
        found: list[FeatureMaps] = [member(own) for member, own in zip(self.members, self._split(images), strict=True)]
        prefixed = any(features.prefix for features in found)
        features = FeatureMaps(
            maps=tuple([tokens for each in found for tokens in each.maps]),
            layers=tuple([layer for each in found for layer in each.layers]),
            grids=tuple([grid for each in found for grid in each.grids]),
            prefix=tuple([tokens for each in found for tokens in each.prefix or _no_prefix(each)]) if prefixed else (),
            sources=tuple([source for source, each in enumerate(found) for _ in each.layers]),
        )
        if self.resample is not None:
            features = features.resample(self.grid or features.grids[0], self.resample)
        return features if self.order is None else features.take(self.order)

    def _split(self, images: torch.Tensor | Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        if isinstance(images, (tuple, list)):
            if len(images) != len(self.members):
                raise InputError(
                    f"images are {len(images)} tensors for {len(self.members)} backbones; give one for each, or one "
                    "tensor with the channels of all, as prepare makes it."
                )
            for own, member in zip(images, self.members, strict=True):
                check_images(own, member.in_channels)
            return images
        check_images(images, self.in_channels)
        assert isinstance(images, torch.Tensor)
        parts = images.split([member.in_channels for member in self.members], dim=1)
        if tuple(images.shape[2:]) != self.image_size:
            return parts
        sizes = [member.image_size for member in self.members]
        return [part[..., :height, :width] for part, (height, width) in zip(parts, sizes, strict=True)]

    def grids(self, size: int | Sequence[int] | None = None) -> tuple[Grid, ...]:
        """Return the grids of all maps, as a fuser wants them: L pairs (H, W), in patches.

        ``size`` is that of the images, in pixels: one edge, or (height, width); the native size if None. A ValueError
        says why a backbone cannot take it.
        """
        given = None if size is None or as_pair(size) == self.image_size else size
        own = [member.grids(given) for member in self.members]
        if self.resample is not None:
            own = [(self.grid or own[0][0],) * len(grids) for grids in own]
        return self._in_order(own)

    def _in_order(self, own: Iterable[Sequence[_T]]) -> tuple[_T, ...]:
        """Return what each backbone has of each of its maps, in the order of the maps."""
        flat = [each for of_member in own for each in of_member]
        return tuple(flat if self.order is None else [flat[place] for place in self.order])

    def set_gradient_checkpointing(self, enable: bool = True) -> None:
        """Recompute block activations in the backward pass instead of keeping them.

        Raises:
            ValueError: if a model has no such switch.
        """
        for member in self.members:
            member.set_gradient_checkpointing(enable)

    def extra_repr(self) -> str:
        """Return how maps come to one grid, for ``print(group)``."""
        return f"resample={self.resample!r}, grid={self.grid}, image_size={self.image_size}"


def _as_backbones(backbones: Sequence[Backbone]) -> Sequence[Backbone]:
    given: Any = list(backbones) if isinstance(backbones, Iterable) else backbones
    if not isinstance(given, list) or not all(isinstance(each, Backbone) for each in given):
        kinds = ", ".join(type(each).__name__ for each in given) if isinstance(given, list) else type(given).__name__
        raise InvalidTypeError(
            f"a group of backbones was given: {kinds}; give a list of backbones, as create_backbone makes them. Groups "
            "do not hold groups: list the backbones of all."
        )
    if not given:
        raise InputError("a group of backbones needs at least one; got none.")
    return given


def _as_order(order: Sequence[int] | None, count: int) -> tuple[int, ...] | None:
    if order is None:
        return None
    given = tuple(order) if isinstance(order, Iterable) else ()
    if not all(isinstance(place, Integral) for place in given) or sorted(given) != list(range(count)):
        raise InputError(f"order is {given or order!r}; give each position from 0 to {count - 1} once.")
    return tuple(map(int, given))


def _no_prefix(features: FeatureMaps) -> list[torch.Tensor]:
    return [tokens[:, :0] for tokens in features.maps]


def _as_grid(grid: Sequence[int] | None, resample: str | None) -> Grid | None:
    if grid is None:
        return None
    target = as_grid(grid)
    if resample is None:
        raise InputError(f"grid={target} needs a way to get there; give resample, too: {', '.join(RESAMPLING)}.")
    return target
