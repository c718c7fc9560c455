"""Data by their paths: which form a file or folder has, several of them as one, and shares of them.

    a.json  a.jsonl  a.csv  a.tsv      names of images are relative to the image folder
    a.parquet  a.arrow  a.tar          images inside, if the columns do not name files
    folder                             images/ with samples.csv, .tsv, .json or .jsonl; parquet files or tars, sorted by
                                       name; or a data set of Hugging Face's `save_to_disk`
    "folder/train-*.parquet"           the files of one data set

`a.json:0.5` is a share: half of the samples of a.json.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import numpy as np

from layerfuse.errors import InputError, MissingFileError

from .files import SampleFile, TextTable
from .samples import is_video
from .source import JoinedSamples, SampleSource, Selection
from .tables import TableFile
from .tars import TarFile

__all__ = ["SampleMix", "read_samples"]

_SHARE = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")
_STREAM = re.compile(r"(-|pipe:.*|[a-z][a-z0-9+.-]+://.*)", re.IGNORECASE)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]+)?")
_PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z")
_FORMS = "a json, jsonl, csv, tsv, parquet, arrow or tar file, or a folder of one of the forms in docs/data.md"


class SampleMix(JoinedSamples):
    """Shares of several sources, one source after the other.

    A share of 0.5 is half of a source's samples, in their order, drawn by the seed and the source's number of samples
    alone; 2.0 is every sample twice, 1.5 all and then a half of them.

    Args:
        sources: with different labels.
        shares: of each, above 0.
        seed: that samples are drawn by.
    """

    def __init__(self, sources: Sequence[SampleSource], shares: Sequence[float], seed: int) -> None:
        drawn = [_drawn(source, share, seed) for source, share in zip(sources, shares, strict=True)]
        super().__init__(
            [
                source if share == 1 else Selection(source, indices)
                for source, share, indices in zip(sources, shares, drawn, strict=True)
            ]
        )
        self._counts = [
            f"{len(indices):,} of {source.label}" + (f" ({share:g} × {len(source):,})" if share != 1 else "")
            for source, share, indices in zip(sources, shares, drawn, strict=True)
        ]

    @property
    def counts(self) -> str:
        """Numbers of samples, for a line before training."""
        return f"{len(self):,} samples: {', '.join(self._counts)}"


def _drawn(source: SampleSource, share: float, seed: int) -> np.ndarray:
    number = math.floor(share * len(source) + 0.5)
    if not number:
        raise InputError(
            f"a share of {share:g} of {source.label} is none of its {len(source):,} samples; give a larger one, or "
            "leave it out."
        )
    every = np.arange(len(source))
    # numpy's old generator, whose numbers no version changes.
    rest = np.random.RandomState(seed).permutation(len(source))[: number % len(source)]
    return np.concatenate([np.tile(every, number // len(source)), np.sort(rest)])


def read_samples(path: str | Path | Sequence[str | Path], *, seed: int = 0) -> SampleSource:
    """Open data of any form, or a mix of several; samples are read when they are asked for.

    Args:
        path: a file or folder, or several, each with a share behind it if not all of its samples are wanted once:
            `a.json:0.5`. What exists under the whole name is no share.
        seed: that samples of a share are drawn by.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it has none of the forms, is damaged, or holds no samples.
        ImportError: if a package is missing that reads it.
    """
    given = [path] if isinstance(path, str | Path) else [*path]
    if not given:
        raise InputError(f"no data are given; give {_FORMS}.")
    paths, shares = zip(*map(_split, given), strict=True)
    if len({Path(own).resolve() for own in paths}) < len(paths):
        raise InputError(f"{', '.join(map(str, given))} name a file twice; give one share of it.")
    sources = [_open(own, label) for own, label in zip(paths, _labels(paths), strict=True)]
    return sources[0] if len(sources) == 1 and shares[0] == 1 else SampleMix(sources, shares, seed)


def _split(path: str | Path) -> tuple[str, float]:
    found = _SHARE.fullmatch(str(path))
    return (str(path), 1.0) if found is None or Path(path).exists() else (found[1], float(found[2]))


def _labels(paths: Sequence[str | Path]) -> list[str]:
    """Names of files, with as many folders in front as tell them apart."""
    # As they are written: what a link points to may be called anything.
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    depth = next(depth for depth in count(1) if len({own[-depth:] for own in parts}) == len({*parts}))
    return ["/".join(own[-depth:]).lstrip("/") for own in parts]


def _open(path: str, label: str) -> SampleSource:
    place = Path(path)
    if _STREAM.fullmatch(path):
        raise InputError(f"{path} is a stream, of which no sample can be found by its number; download it to a file.")
    if not place.exists() and (found := sorted(glob.glob(path))):
        return _join([Path(own) for own in found], label)
    if place.is_dir():
        return _open_folder(place, label)
    if place.exists() and not place.is_file():
        raise InputError(f"{path} is a pipe or device, in which no sample can be found by its number; give a file.")
    if not place.exists():
        raise MissingFileError(f"data file {path} does not exist; give {_FORMS}.")
    return _open_file(place, label)


def _open_file(path: Path, label: str) -> SampleSource:
    with path.open("rb") as file:
        head = file.read(512)
    ending = path.suffix.lower()
    if head[:4] == b"PAR1" or head[:6] == b"ARROW1" or ending in (".parquet", ".arrow"):
        return TableFile(path, label)
    if head[257:262] == b"ustar" or ending == ".tar":
        return TarFile(path, label)
    if ending in _PACKED:
        raise InputError(f"data file {path} is packed, and no sample can be found in it by its number; unpack it.")
    if is_video(path.name):
        raise InputError(f"data file {path} is a video, and images alone are read; give {_FORMS}.")
    return TextTable(path, label) if ending in (".csv", ".tsv") else SampleFile(path, label)


def _join(paths: Sequence[Path], label: str) -> SampleSource:
    if len(paths) == 1:
        return _open_file(paths[0], label)
    # Files of one name in several folders have images of one name, too.
    named = zip(paths, _labels(paths), strict=True)
    return JoinedSamples([_open_file(path, f"{label}/{own}") for path, own in named], label)


def _open_folder(folder: Path, label: str) -> SampleSource:
    if (split := folder / "dataset_dict.json").is_file():
        names = json.loads(split.read_text(encoding="utf-8")).get("splits", [])
        choices = ", ".join(str(folder / name) for name in names)
        raise InputError(f"{folder} holds a data set of several splits; give one of them: {choices}.")
    if (state := folder / "state.json").is_file():
        files = json.loads(state.read_text(encoding="utf-8")).get("_data_files", [])
        return _join([folder / own["filename"] for own in files], label)
    tables = [path for ending in ("csv", "tsv", "json", "jsonl") if (path := folder / f"samples.{ending}").is_file()]
    if len(tables) == 1 and (folder / "images").is_dir():
        kind = TextTable if tables[0].suffix in (".csv", ".tsv") else SampleFile
        return kind(tables[0], label, folder / "images")
    for ending in ("parquet", "tar"):
        found = sorted(folder.glob(f"*.{ending}")) or sorted(folder.glob(f"*/*.{ending}"))
        kinds = {str(path.parent / (shard[1] if (shard := _SHARD.fullmatch(path.stem)) else "")) for path in found}
        if len(kinds) > 1:
            patterns = ", ".join(f"{kind}*.{ending}" for kind in sorted(kinds))
            raise InputError(f"{folder} holds several data sets or splits; give the files of one: {patterns}.")
        if found:
            return _join(found, label)
    raise InputError(
        f"{folder} is no data set: it holds {len(tables)} tables samples.csv, .tsv, .json or .jsonl "
        f"{'beside' if (folder / 'images').is_dir() else 'and no'} images/, no state.json of save_to_disk, no parquet "
        "file and no tar. Write one table beside images/; pairs of name.jpg and name.txt or name.json make a tar: "
        f"tar -cf data.tar -C {folder} ."
    )
