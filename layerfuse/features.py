"""The one value that travels between the parts of layerfuse: feature maps that carry their own geometry.

Shape legend, valid in the whole library:

======  =====================================================================
letter  meaning
======  =====================================================================
B       batch size, in images
L       number of tapped layers (maps)
H, W    height and width of a patch grid, in patches; ``grid = (H, W)``
N       number of patch tokens of a map, ``N = H * W``, row-major over the grid
P       number of prefix tokens (class token, registers)
C       channels of a map (the backbone's ``embed_dim``)
D       width of the language model
Q       number of query tokens
M       number of attention heads
K       number of sampling points per head and level
S       sum of N over the maps that are attended to
======  =====================================================================

Layer numbers follow Hugging Face ``hidden_states``: ``0`` is the embedding output that enters block 1, ``k`` the output
of block ``k`` before any final norm.
"""

from __future__ import annotations

import json
import numbers
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from layerfuse.errors import InputError, MissingFileError, UnknownKeyError
from layerfuse.files import atomic_file, read_safetensors
from layerfuse.registry import unknown_name_message

__all__ = ["CELLS", "RESAMPLING", "FeatureMaps", "Grid", "as_grid", "resample_map", "resample_tokens"]

Grid = tuple[int, int]

# What `FeatureMaps.resample` takes, and torch's own way of each. Corner cells stay on corner cells, as in Eagle
# (arXiv:2408.15998); the nearest cell is the one whose centre is nearest.
RESAMPLING: dict[str, dict[str, Any]] = {
    "bilinear": {"mode": "bilinear", "align_corners": True},
    "bicubic": {"mode": "bicubic", "align_corners": True},
    "nearest": {"mode": "nearest-exact"},
}

# Cells over the pixels that they cover, as convolutions have them.
CELLS: dict[str, Any] = {"mode": "bilinear", "align_corners": False}

_GEOMETRY = "layerfuse.feature_maps"


def as_grid(grid: Any, what: str = "grid") -> Grid:
    """Return a grid as the pair that it is wherever grids are compared; lists and numpy's integers are taken.

    Args:
        grid: (H, W), in patches.
        what: stands for the grid in the message.

    Raises:
        ValueError: if it is no pair of whole numbers of at least 1.
    """
    edges = tuple(grid) if isinstance(grid, Iterable) else ()
    if len(edges) != 2 or not all(_is_edge(edge) for edge in edges):
        raise InputError(
            f"{what} is {list(edges) or grid!r}; give (H, W) in patches, two whole numbers, both at least 1."
        )
    pair: list[Any] = [edge if isinstance(edge, (int, torch.SymInt)) else int(edge) for edge in edges]
    return pair[0], pair[1]


def _is_edge(edge: Any) -> bool:
    # In a graph with free sizes an edge may be a symbol.
    whole = isinstance(edge, (int, torch.SymInt, numbers.Integral)) and not isinstance(edge, bool)
    return whole and bool(edge >= 1)


@dataclass(frozen=True)
class FeatureMaps:
    """Maps of L tapped layers, in the order they were asked for.

    A pytree of torch: torch.export, torch.func.vmap, FSDP2's hooks and ``torch.utils._pytree.tree_map`` see its
    tensors, and leave its geometry alone. What they build again is not checked, since their leaves need not be maps.

    Args:
        maps: L tensors, each (B, N_l, C_l): patch tokens, row-major over their grid, prefix tokens split off.
        layers: L layer numbers, counted from 0 = embedding output; never negative.
        grids: L pairs (H_l, W_l), in patches.
        prefix: L tensors, each (B, P, C_l), or empty if the backbone has no prefix tokens.
        sources: L numbers that say which backbone each map came from, counted from 0; empty if there is just one.

    Raises:
        ValueError: if the fields disagree with one another.
    """

    maps: tuple[torch.Tensor, ...]
    layers: tuple[int, ...]
    grids: tuple[Grid, ...]
    prefix: tuple[torch.Tensor, ...] = ()
    sources: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.maps)
        if count == 0:
            raise InputError("FeatureMaps needs at least one map, got none; tap at least one layer.")
        optional = {len(self.prefix), len(self.sources)} <= {0, count}
        if len(self.layers) != count or len(self.grids) != count or not optional:
            raise InputError(
                f"FeatureMaps got {count} maps, {len(self.layers)} layers, {len(self.grids)} grids, "
                f"{len(self.prefix)} prefix tensors and {len(self.sources)} sources; give one layer and one grid per "
                "map, and of prefix tensors and sources either one per map or none."
            )
        # Lists would make equal geometries differ, and do not hash.
        for name in ("maps", "layers", "prefix", "sources"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        named = zip(self.layers, self.grids, strict=True)
        object.__setattr__(self, "grids", tuple([as_grid(grid, f"the grid of layer {layer}") for layer, grid in named]))
        batch_size = self.maps[0].shape[0]
        for layer, grid, feature_map in zip(self.layers, self.grids, self.maps, strict=True):
            if feature_map.ndim != 3:
                raise InputError(
                    f"the map of layer {layer} has shape {tuple(feature_map.shape)}; expected three dimensions "
                    "(B, N, C): flatten the grid row by row and move channels last."
                )
            height, width = grid
            if feature_map.shape[1] != height * width:
                raise InputError(
                    f"the map of layer {layer} has {feature_map.shape[1]} tokens, but its grid {height}x{width} has "
                    f"{height * width}; split the prefix tokens off and give the grid as (H, W) in patches."
                )
            if feature_map.shape[0] != batch_size:
                raise InputError(
                    f"the map of layer {layer} has batch size {feature_map.shape[0]}, the first map has {batch_size}; "
                    "all maps must come from the same images."
                )

    def __len__(self) -> int:
        return len(self.maps)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Iterate over the L maps, each (B, N_l, C_l)."""
        return iter(self.maps)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return the map at a position among the L (negative counts from the end): (B, N, C)."""
        return self.maps[index]

    @property
    def batch_size(self) -> int:
        """B, in images."""
        return self.maps[0].size(0)

    @property
    def channels(self) -> tuple[int, ...]:
        """Width C_l of each map."""
        return tuple([feature_map.size(-1) for feature_map in self.maps])

    def layer(self, number: int) -> torch.Tensor:
        """Return the map (B, N, C) of a layer number.

        Raises:
            KeyError: if that layer was not tapped.
            ValueError: if it was tapped in more than one backbone.
        """
        count = self.layers.count(number)
        if count == 0:
            raise UnknownKeyError(f"layer {number} was not tapped; tapped layers: {', '.join(map(str, self.layers))}.")
        if count > 1:
            raise InputError(
                f"{count} maps are of layer {number} (layers {self.layers}, sources {self.sources}); take one by its "
                "position: features[i]."
            )
        return self.maps[self.layers.index(number)]

    def nchw(self, index: int) -> torch.Tensor:
        """Return the map at a position among the L with its grid unfolded, (B, C, H, W); a view where memory allows."""
        return self.maps[index].transpose(1, 2).unflatten(2, self.grids[index])

    def spatial(self, index: int) -> torch.Tensor:
        """Return ``nchw(index)``; deprecated name."""
        warnings.warn("FeatureMaps.spatial is deprecated; call nchw.", DeprecationWarning, stacklevel=2)
        return self.nchw(index)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> FeatureMaps:
        """Return feature maps with a function applied to every tensor (B, N, C), maps and prefix tokens alike.

        Raises:
            ValueError: if the results do not fit the grids or one another.
        """
        return replace(self, maps=tuple(map(function, self.maps)), prefix=tuple(map(function, self.prefix)))

    def take(self, positions: Sequence[int]) -> FeatureMaps:
        """Return feature maps of some of the L maps, by their positions, in the order given.

        Raises:
            ValueError: if none is taken.
        """
        lists = {field.name: getattr(self, field.name) for field in fields(self)}
        taken = {name: tuple(items[index] for index in positions) for name, items in lists.items() if items}
        return replace(self, **taken)

    def resample(self, grid: Grid, mode: str = "bilinear") -> FeatureMaps:
        """Return feature maps whose maps all have one grid; those that have it stay as they are.

        Interpolated in float32 at least. Prefix tokens stay.

        Args:
            grid: (H, W), in patches.
            mode: ``"bilinear"`` or ``"bicubic"``, corner cells on corner cells, or ``"nearest"``. With corners on
                corners, a single row or column is the first one of the map, as in torch, and no mean: ``"nearest"``
                takes the middle one.

        Returns:
            L maps, each (B, H * W, C_l).

        Raises:
            ValueError: if there is no such mode, or ``grid`` is no pair of whole numbers of at least 1.
        """
        if mode not in tuple(RESAMPLING):
            raise InputError(unknown_name_message("resampling mode", mode, RESAMPLING))
        target, way = as_grid(grid), RESAMPLING[mode]
        maps = tuple(
            [resample_tokens(tokens, given, target, way) for tokens, given in zip(self.maps, self.grids, strict=True)]
        )
        return replace(self, maps=maps, grids=(target,) * len(maps))

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> FeatureMaps:
        """Return feature maps whose tensors, prefix too, have another device, dtype or both, as `torch.Tensor.to`."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        return self.map(lambda tokens: tokens.to(device, dtype, non_blocking=non_blocking))

    def pin_memory(self) -> FeatureMaps:
        """Return feature maps in page-locked memory, as `torch.Tensor.pin_memory`; DataLoaders call this."""
        return self.map(torch.Tensor.pin_memory)

    def detach(self) -> FeatureMaps:
        """Return feature maps that share memory with these and take no part in gradients."""
        return self.map(torch.Tensor.detach)

    @classmethod
    def cat(cls, parts: Sequence[FeatureMaps]) -> FeatureMaps:
        """Return the feature maps of several batches as those of one, in their order.

        Raises:
            ValueError: if there are none, or they have other layers, grids or sources than the first.
        """
        if not parts:
            raise InputError("FeatureMaps.cat got no feature maps; give at least one.")
        first = _geometry(parts[0])
        if others := [_geometry(part) for part in parts if _geometry(part) != first]:
            raise InputError(
                f"FeatureMaps.cat got maps of (layers, grids, sources) {first} and {others[0]}; join maps of the same."
            )
        maps, prefix = (
            tuple([torch.cat(own) for own in zip(*each, strict=True)])
            for each in ([part.maps for part in parts], [part.prefix for part in parts])
        )
        return replace(parts[0], maps=maps, prefix=prefix)

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write tensors and geometry to one safetensors file, whole or not at all; a file of that name is replaced.

        ``metadata`` goes into the file, too.

        Raises:
            OSError: if it cannot be written.
        """
        from safetensors.torch import save

        named = {"maps": self.maps, "prefix": self.prefix}
        # safetensors stores no views and no memory that two tensors share.
        tensors = {
            f"{name}.{index}": tokens.detach().clone(memory_format=torch.contiguous_format)
            for name, group in named.items()
            for index, tokens in enumerate(group)
        }
        with atomic_file(Path(path)) as file:
            file.write(save(tensors, {**(metadata or {}), "format": "pt", _GEOMETRY: json.dumps(_geometry(self))}))

    @classmethod
    def load(cls, path: str | Path, images: slice | None = None) -> FeatureMaps:
        """Return the feature maps of a file that `save` wrote, on the CPU; of ``images`` of the batch only, if given.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged or holds something else.
        """
        if not Path(path).is_file():
            raise MissingFileError(f"{path} is no file; give one that FeatureMaps.save wrote.")
        stored, metadata = read_safetensors(path, images)
        if _GEOMETRY not in metadata:
            raise InputError(f"{path} holds tensors but no feature maps; give a file that FeatureMaps.save wrote.")
        maps, prefix = (
            tuple(stored[f"{name}.{index}"] for index in range(len(stored)) if f"{name}.{index}" in stored)
            for name in ("maps", "prefix")
        )
        layers, grids, sources = _as_geometry(json.loads(metadata[_GEOMETRY]))
        return cls(maps, layers, grids, prefix, sources)


def resample_tokens(tokens: torch.Tensor, given: Grid, grid: Grid, way: Mapping[str, Any]) -> torch.Tensor:
    """Return (B, N, C) tokens on another grid, (B, H * W, C), interpolated in float32 at least.

    Args:
        tokens: (B, N, C); returned as they are if they are on that grid.
        given: their own grid.
        grid: (H, W) of the result.
        way: what torch's `interpolate` is told, such as an entry of `RESAMPLING`.
    """
    if given == grid:
        return tokens
    return resample_map(tokens.transpose(1, 2).unflatten(2, given), grid, way).flatten(2).transpose(1, 2)


def resample_map(image: torch.Tensor, grid: Grid, way: Mapping[str, Any]) -> torch.Tensor:
    """Return a map (B, C, H, W) on another grid, as `resample_tokens` does it."""
    if tuple(image.shape[2:]) == grid:
        return image
    precise = image.to(torch.promote_types(image.dtype, torch.float32))
    return F.interpolate(precise, size=grid, **way).to(image.dtype)


_Geometry = tuple[tuple[int, ...], tuple[Grid, ...], tuple[int, ...]]


def _geometry(features: FeatureMaps) -> _Geometry:
    return features.layers, features.grids, features.sources


def _as_geometry(lists: Sequence[Any]) -> _Geometry:
    """Return a geometry whose tuples JSON turned into lists."""
    layers, grids, sources = lists
    return tuple(layers), tuple((height, width) for height, width in grids), tuple(sources)


def _flatten(features: FeatureMaps) -> tuple[list[Any], _Geometry]:
    return [features.maps, features.prefix], _geometry(features)


def _flatten_with_keys(features: FeatureMaps) -> tuple[list[tuple[Any, Any]], _Geometry]:
    keys = [pytree.GetAttrKey("maps"), pytree.GetAttrKey("prefix")]
    return list(zip(keys, (features.maps, features.prefix), strict=True)), _geometry(features)


def _unflatten(children: Iterable[Any], geometry: _Geometry) -> FeatureMaps:
    """Feature maps without the checks: inside vmap, or with names, numbers or None for leaves, they mean nothing."""
    features = object.__new__(FeatureMaps)
    for name, value in zip(("maps", "prefix", "layers", "grids", "sources"), (*children, *geometry), strict=True):
        object.__setattr__(features, name, value)
    return features


pytree.register_pytree_node(
    FeatureMaps,
    _flatten,
    _unflatten,
    serialized_type_name="layerfuse.FeatureMaps",
    to_dumpable_context=list,
    from_dumpable_context=_as_geometry,
    flatten_with_keys_fn=_flatten_with_keys,
)
