"""Feature maps of a folder of pictures on disk: written once, read one picture at a time.

    <folder>/store.json                what the maps are of: backbone, weights, preprocessing, type of the numbers
            /shard-<…>.safetensors     maps of some pictures, as `FeatureMaps.save` writes them, with their names

Files appear whole or not at all, and which pictures are there is read from the shards alone: whoever stops or kills
`extract_folder` loses the shard that was being made, and starts it again to go on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from layerfuse.backbones import AnyBackbone
from layerfuse.errors import ExistingFileError, InputError, MissingFileError, UnknownKeyError
from layerfuse.features import FeatureMaps
from layerfuse.files import check_disk_space, read_safetensors_metadata, remove_scratch_files, write_text
from layerfuse.pictures import picture_names, read_picture

__all__ = ["FeatureStore", "extract_folder"]

_log = logging.getLogger(__name__)

# Raised when files have another form than those before.
_FORMAT = 1
_ABOUT = "store.json"
_NAMES = "layerfuse.pictures"


class FeatureStore(Mapping[str, FeatureMaps]):
    """The feature maps of a folder of pictures, by the pictures' names; a map is read when it is asked for.

        store = FeatureStore("store")
        features = store["cats/one.jpg"]  # FeatureMaps of one picture, B = 1

    A mapping: ``len(store)``, ``name in store``, and ``store.items()``, which holds one picture at a time.

    Args:
        folder: that `extract_folder` or ``layerfuse extract`` filled, to the end or not.

    Attributes:
        folder: the same.
        about: what stands in ``store.json``: the backbone's config, digests of its weights, type of the numbers.

    Raises:
        FileNotFoundError: if the folder is no store.
        ValueError: if a file of it is damaged, or it was written by a later version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.about = _read_about(self.folder)

    @cached_property
    def _places(self) -> dict[str, tuple[Path, int]]:
        """Of each picture its shard, and its position in it."""
        return {name: (shard, place) for shard, names in _shards(self.folder) for place, name in enumerate(names)}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all pictures, in order: paths from the folder that they were in, with slashes."""
        return tuple(sorted(self._places))

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names, in order."""
        return iter(self.names)

    def __getitem__(self, name: str) -> FeatureMaps:
        """Return the feature maps of a picture, (1, N, C) each, on the CPU; a KeyError if there are none."""
        if name not in self._places:
            shown = ", ".join(self.names[:3]) or "nothing"
            raise UnknownKeyError(
                f"picture {name!r} is not in {self.folder}, which has {len(self)} of them ({shown}, …); names are "
                "paths from the folder of pictures."
            )
        shard, place = self._places[name]
        return FeatureMaps.load(shard, images=slice(place, place + 1))


def extract_folder(
    pictures: str | Path,
    backbone: AnyBackbone,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    batch_size: int = 16,
    shard_size: int = 64,
    num_workers: int = 4,
    notes: Mapping[str, Any] | None = None,
    report: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """Write the feature maps of all pictures in a folder into a `FeatureStore`, or those that it lacks.

    A picture is known by its name: one that was changed since is not read again. Several processes may fill one store.

    Args:
        pictures: folder of pictures, and of folders of them.
        backbone: that makes the maps, as it is: device, dtype and preprocessing.
        out: folder of the store; made if need be.
        dtype: of the numbers in files; the backbone's if None.
        batch_size: pictures that go through the backbone at a time.
        shard_size: pictures in a file, in whole batches; what a killed process loses.
        num_workers: threads that read pictures.
        notes: for whoever reads ``store.json``, such as the model's name; those of the first call stay.
        report: is called with the number of pictures that are done, of those that there are.

    Returns:
        Why not, for each picture that could not be read; the rest is in the store, and a later call tries these again.

    Raises:
        ValueError: before anything is read, if there is no picture, or the store is of another backbone, other weights,
            layers, preprocessing or type of numbers; the message says which.
        FileNotFoundError: if there is no folder of pictures.
        FileExistsError: if ``out`` has files and is no store.
        OSError: if the disk has no room for all of it.
    """
    for what, number in (("batch_size", batch_size), ("shard_size", shard_size), ("num_workers", num_workers)):
        if number < 1:
            raise InputError(f"{what} is {number}; give at least 1.")
    folder, place = Path(pictures), Path(out)
    names = picture_names(folder)
    stored = backbone.dtype if dtype is None else dtype
    about = _describe(backbone, stored)
    _check_store(place, about)
    there = {name for _, held in _shards(place) for name in held}
    missing = [name for name in names if name not in there]
    check_disk_space(place, len(missing) * _picture_bytes(backbone, stored), "a store of these feature maps")
    place.mkdir(parents=True, exist_ok=True)
    remove_scratch_files(place)
    if not (place / _ABOUT).exists():
        write_text(place / _ABOUT, json.dumps({**about, "notes": dict(notes or {})}, indent=1) + "\n")
    bad: dict[str, str] = {}
    held: list[str] = []
    parts: list[FeatureMaps] = []
    done = len(names) - len(missing)
    with ThreadPoolExecutor(num_workers) as pool, torch.no_grad():
        for batch in _read_ahead(folder, missing, backbone, pool, batch_size):
            images = [image for image in batch.values() if isinstance(image, torch.Tensor)]
            if images:
                parts.append(backbone(torch.stack(images).to(backbone.device, backbone.dtype)).to("cpu", stored))
            for name, image in batch.items():
                if isinstance(image, InputError):
                    _log.warning("%s", image)
                    bad[name] = str(image)
                else:
                    held.append(name)
            if len(held) >= shard_size:
                _write_shard(place, held, parts)
                held, parts = [], []
            done += len(batch)
            if report is not None:
                report(done, len(names))
        if held:
            _write_shard(place, held, parts)
    return bad


def _read_ahead(
    folder: Path, names: Sequence[str], backbone: AnyBackbone, pool: ThreadPoolExecutor, batch_size: int
) -> Iterator[dict[str, torch.Tensor | InputError]]:
    """Give batch after batch the prepared pictures, or why they cannot be read; the next one is read meanwhile."""

    def read(name: str) -> torch.Tensor | InputError:
        try:
            return backbone.preprocessing(read_picture(folder / name))
        except InputError as error:
            return error

    waiting: deque[tuple[Sequence[str], Iterator[torch.Tensor | InputError]]] = deque()
    for start in range(0, len(names), batch_size):
        batch = names[start : start + batch_size]
        waiting.append((batch, pool.map(read, batch)))
        if len(waiting) > 1:
            yield dict(zip(*waiting.popleft(), strict=True))
    for batch, pictures in waiting:
        yield dict(zip(batch, pictures, strict=True))


def _write_shard(folder: Path, names: Sequence[str], parts: Sequence[FeatureMaps]) -> None:
    text = json.dumps(names)
    # Processes that fill one store in another order give their files other names.
    name = f"shard-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    FeatureMaps.cat(parts).save(folder / name, metadata={_NAMES: text})


def _describe(backbone: AnyBackbone, stored: torch.dtype) -> dict[str, Any]:
    """Return what the maps depend on besides the pictures, as JSON has it."""
    digests = [member.layer_digests() for member in backbone.members]
    about = {
        "format": _FORMAT,
        "backbone": backbone.config,
        "weights": [digests[source][layer] for source, layer in backbone.taps],
        "dtype": str(stored).removeprefix("torch."),
    }
    plain: dict[str, Any] = json.loads(json.dumps(about))
    return plain


def _check_store(folder: Path, about: dict[str, Any]) -> None:
    """Refuse a folder that maps of this description cannot go into."""
    if folder.exists() and not folder.is_dir():
        raise ExistingFileError(errno.EEXIST, f"{folder} is a file; give a folder, or a name that is not taken")
    if not (folder / _ABOUT).exists():
        # A process that was killed early may have left its scratch file, which is hidden.
        if folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise ExistingFileError(errno.EEXIST, f"{folder} has files and is no store; give a new or an empty folder")
        return
    flat, asked = (_flat(each) for each in (_read_about(folder), about))
    # Weights are those of the layers, so that they differ wherever these do.
    if other := sorted(key for key in {*flat, *asked} if flat.get(key) != asked.get(key)):
        other = [key for key in other if key != "weights"] or other
        shown = "; ".join(
            f"{key} is {_short(flat.get(key))}, and {_short(asked.get(key))} is asked for" for key in other
        )
        raise InputError(f"the store {folder} is of other feature maps: {shown}. Give another folder for these.")


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description with the backbone's config unfolded, so that the part that differs has a name."""
    return {**about["backbone"], **{key: value for key, value in about.items() if key not in ("backbone", "notes")}}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}…"


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / _ABOUT
    if not path.is_file():
        raise MissingFileError(
            f"{folder} holds no {_ABOUT}; give the folder of a store that `layerfuse extract` filled."
        )
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = about["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} describes no store ({error}); extract the features anew.") from error
    if found != _FORMAT:
        raise InputError(f"{path} is of format {found}, and this layerfuse reads {_FORMAT}; use the one that wrote it.")
    return about


def _shards(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """The shards of a store, with the names of the pictures in each."""
    for path in sorted(folder.glob("shard-*.safetensors")):
        text = read_safetensors_metadata(path).get(_NAMES)
        if text is None:
            raise InputError(f"{path} is no shard of a store: it names no pictures; take it out of the folder.")
        yield path, json.loads(text)


def _picture_bytes(backbone: AnyBackbone, stored: torch.dtype) -> int:
    """Bytes that the maps of one picture take."""
    tokens = (
        height * width + backbone.members[source].num_prefix_tokens
        for (source, _), (height, width) in zip(backbone.taps, backbone.grids(), strict=True)
    )
    return sum(math.prod(each) for each in zip(tokens, backbone.map_channels, strict=True)) * stored.itemsize
