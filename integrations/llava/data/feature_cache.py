"""Feature maps of a frozen backbone on disk, so that an image is encoded once for many epochs, stages and runs.

    <folder>/<key of a map>/map.json                      what it is a map of: backbone, layer, preprocessing, versions
                           /<ab>/<abcd…>.safetensors      the map of one image, named by the digest of its file

A map has a key of its own, so that runs which tap other layers of the same backbone share those they have in common.
Everything that a map depends on is part of its key or of the image's digest: what changes gets other files. Files
appear whole; many processes may write and read one folder. Fuser and condition (what is asked about an image) come
behind the backbone, and no map depends on them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save

from integrations.llava.config import CacheType
from integrations.llava.image_layout import ImageLayout, ImageSize
from layerfuse.backbones import AnyBackbone
from layerfuse.features import FeatureMaps, Grid
from layerfuse.files import atomic_file, write_text
from layerfuse.preprocessing import AnyPreprocessing, StackedPreprocessing

from .places import ImagePlace

__all__ = ["FeatureCache", "open_feature_cache", "picture_digest", "tile_bytes"]

_log = logging.getLogger(__name__)

# Raised when files have another form than those before.
_FORMAT = 1
_PARTS = {"tokens", "image_size", "checksum"}


@dataclass(frozen=True)
class CachedMap:
    """One of the maps of a cache: its folder, and its place among feature maps.

    Attributes:
        folder: of its files; the name is the digest of all that the map depends on but the image.
        layer: number of its layer.
        source: position of its backbone among several.
        grid: (H, W) in patches.
        num_prefix: P, prefix tokens in front of the patch tokens in a file.
        described: what the folder's name is the digest of.
    """

    folder: Path
    layer: int
    source: int
    grid: Grid
    num_prefix: int
    described: Mapping[str, Any]

    def file(self, digest: str) -> Path:
        """File of an image."""
        return self.folder / digest[:2] / f"{digest}.safetensors"


class FeatureCache:
    """The maps that a run reads, of all images that the folder holds.

    Args:
        maps: in the order of the feature maps.
        stored: type of the numbers in new files.
        several: whether the maps are of several backbones.
    """

    def __init__(self, maps: Sequence[CachedMap], *, stored: CacheType, several: bool) -> None:
        self.maps = tuple(maps)
        self.stored = stored
        self.several = several

    def holds(self, digest: str) -> bool:
        """Whether all maps of an image are there; a file that is cut off is removed, and said."""
        return all(_is_whole(own.file(digest)) for own in self.maps)

    def read(self, digest: str) -> tuple[FeatureMaps, ImageSize] | None:
        """Read the maps of an image, (tiles, N, C) each, and its (height, width) in pixels before it was prepared.

        They are float32 or bfloat16. None if one is missing or damaged; a damaged file is removed, and said.
        """
        tokens, size = [], (0, 0)
        for own in self.maps:
            found = _read(own.file(digest))
            if found is None:
                return None
            tokens.append(found[0])
            size = found[1]
        prefixed = any(own.num_prefix for own in self.maps)
        features = FeatureMaps(
            maps=tuple(read[:, own.num_prefix :] for own, read in zip(self.maps, tokens, strict=True)),
            layers=tuple(own.layer for own in self.maps),
            grids=tuple(own.grid for own in self.maps),
            prefix=tuple(read[:, : own.num_prefix] for own, read in zip(self.maps, tokens, strict=True))
            if prefixed
            else (),
            sources=tuple(own.source for own in self.maps) if self.several else (),
        )
        return features, size

    def write(self, digest: str, features: FeatureMaps, size: ImageSize) -> None:
        """Write the maps of an image that are not there, each whole or not at all.

        Args:
            digest: of the image's file.
            features: (tiles, N, C) each, as the backbone gave them.
            size: (height, width) of the image in pixels.

        Raises:
            OSError: if they cannot be written.
        """
        prefix = features.prefix or [tokens[:, :0] for tokens in features.maps]
        for own, front, tokens in zip(self.maps, prefix, features.maps, strict=True):
            path = own.file(digest)
            if _is_whole(path):
                continue
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text(own.folder / "map.json", json.dumps(own.described, indent=1) + "\n")
            stored = _packed(torch.cat([front, tokens], dim=1).cpu(), self.stored)
            stored["image_size"] = torch.tensor(size)
            # What a power cut leaves half-written is found by its checksum.
            with atomic_file(path, flush=False) as file:
                file.write(save(stored | {"checksum": torch.tensor(_checksum(stored))}))


def picture_digest(place: ImagePlace) -> str:
    """Digest (SHA-256, shortened) of an image's bytes; an OSError if it cannot be read."""
    return hashlib.sha256(place.read_bytes()).hexdigest()[:40]


def open_feature_cache(
    folder: str | Path,
    backbone: AnyBackbone,
    preprocessing: AnyPreprocessing,
    layout: ImageLayout,
    *,
    stored: CacheType,
    computed: Mapping[str, Any],
) -> FeatureCache:
    """Open the cache in a folder, which need not exist, for the maps that a backbone gives; nothing is written.

    Args:
        folder: shared by as many runs as like.
        backbone: frozen; its weights are part of the keys.
        preprocessing: of the images.
        layout: says which tiles an image is cut into.
        stored: type of the numbers in files.
        computed: what else changes the numbers: device and precision of the computation.
    """
    parts = preprocessing.parts if isinstance(preprocessing, StackedPreprocessing) else (preprocessing,)
    digests = [member.layer_digests() for member in backbone.members]
    pinpoints = getattr(layout, "pinpoints", None)
    maps = []
    for (source, layer), grid in zip(backbone.taps, backbone.grids(), strict=True):
        member = backbone.members[source]
        own = member.grids()[0]
        described = {
            "format": _FORMAT,
            "backbone": member.config["recipe"],
            "digest": digests[source][layer],
            "layer": layer,
            "preprocessing": parts[source].to_dict(),
            # Tiles of several backbones are cut by all of their sizes together.
            "tiles": None if pinpoints is None else {"pinpoints": pinpoints, "cut_by": preprocessing.to_dict()},
            "resampled": None if grid == own else {"grid": grid, "mode": getattr(backbone, "resample", None)},
            "stored": stored,
            "computed": dict(computed),
            "versions": _versions(member.library),
        }
        text = json.dumps(described, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:20]
        maps.append(CachedMap(Path(folder) / key, layer, source, grid, member.num_prefix_tokens, described))
    return FeatureCache(maps, stored=stored, several=len(backbone.members) > 1)


def _versions(library: str) -> dict[str, str]:
    """Versions of the packages that decode pictures and compute, with the one that a backbone's model is from."""
    used = {"torch", "pillow", "open_clip_torch" if library == "open_clip" else library} - {""}
    return {name: metadata.version(name) for name in sorted(used)}


def tile_bytes(backbone: AnyBackbone, stored: CacheType) -> int:
    """Bytes that a cache takes for one image, or one tile of an image, at most: all maps of a backbone."""
    width = {"fp32": 4, "bf16": 2, "int8": 1}[stored]
    scale = 4 if stored == "int8" else 0
    total = 0
    for (source, _), grid, channels in zip(backbone.taps, backbone.grids(), backbone.map_channels, strict=True):
        tokens = grid[0] * grid[1] + backbone.members[source].num_prefix_tokens
        total += tokens * (channels * width + scale) + _HEAD
    return total


# Bytes of a file's head, roughly.
_HEAD = 400


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except FileNotFoundError:
        return False
    except (OSError, SafetensorError) as error:
        _say_damaged(path, str(error))
        return False


def _read(path: Path) -> tuple[torch.Tensor, ImageSize] | None:
    try:
        stored = load(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        _say_damaged(path, str(error))
        return None
    if not stored.keys() >= _PARTS or _checksum(stored) != int(stored["checksum"]):
        _say_damaged(path, "its checksum is another")
        return None
    height, width = stored["image_size"].tolist()
    return _unpacked(stored), (height, width)


def _say_damaged(path: Path, why: str) -> None:
    _log.warning("feature cache: %s is damaged (%s); its image is encoded again", path, why)
    path.unlink(missing_ok=True)


def _packed(tokens: torch.Tensor, stored: CacheType) -> dict[str, torch.Tensor]:
    """Tensors of a file: `tokens` (tiles, P + N, C) and, of 8 bits, their `scale` (tiles, P + N, 1)."""
    if stored == "int8":
        values = tokens.float()
        scale = values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        return {"tokens": (values / scale).round().to(torch.int8), "scale": scale}
    return {"tokens": (tokens.bfloat16() if stored == "bf16" else tokens).contiguous()}


def _unpacked(stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
    tokens = stored["tokens"]
    return tokens if tokens.is_floating_point() else tokens.float() * stored["scale"]


def _checksum(stored: Mapping[str, torch.Tensor]) -> int:
    total = 0
    for name in ("tokens", "scale", "image_size"):
        if name in stored:
            total = zlib.crc32(stored[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return total
