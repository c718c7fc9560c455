"""New data files out of old ones: cleaned, or one sample a line. The original is never written to."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from layerfuse.errors import ExistingFileError, InputError
from layerfuse.files import atomic_file

from ..files import SampleFile
from ..source import SampleSource
from .findings import Finding
from .survey import Survey

__all__ = ["Cleaned", "clean_path", "write_clean", "write_lines"]

# JSON has no line breaks but between its values, where they mean nothing.
_LINE_BREAKS = re.compile(rb"[ \t\r]*\n\s*|\r")


@dataclass(frozen=True)
class Cleaned:
    """A cleaned file: in `num_repaired` of its samples image names were corrected, `num_dropped` were left out."""

    path: Path
    num_samples: int
    num_repaired: int
    num_dropped: int


def clean_path(samples: SampleSource) -> Path | None:
    """Name of the cleaned file, beside the original: `X.clean.jsonl`; None if it is no json or jsonl file by itself."""
    if type(samples) is not SampleFile or samples.images_inside:
        return None
    return samples.path.with_name(f"{samples.path.stem}.clean.jsonl")


def write_clean(samples: SampleFile, survey: Survey) -> Cleaned:
    """Write the usable samples to `clean_path`, as they are written in the original, one a line.

    A sample whose only problems are endings of image names is repaired; one with any other problem is left out.

    Args:
        samples: the original, for which there is a `clean_path`.
        survey: of the original.

    Raises:
        FileExistsError: if there is a file of that name.
        ValueError: if no sample is left.
    """
    problems: dict[int, list[Finding]] = defaultdict(list)
    for finding in survey.problems:
        problems[finding.index].append(finding)
    repairs = {
        index: {finding.image: finding.repair for finding in own}
        for index, own in problems.items()
        if all(finding.repair for finding in own)
    }
    kept = [index for index in range(len(samples)) if index not in problems or index in repairs]
    if not kept:
        raise InputError(f"no sample of {samples.path} can be used, so there is nothing to write.")
    target = clean_path(samples)
    assert target is not None

    def line(index: int) -> bytes:
        if index not in repairs:
            return samples.raw(index)
        sample, names = samples[index], repairs[index]
        images = sample["image"]
        renamed = names.get(images, images) if isinstance(images, str) else [names.get(name, name) for name in images]
        return json.dumps({**sample, "image": renamed}).encode()

    _write(target, (line(index) for index in kept), len(kept))
    return Cleaned(target, len(kept), len(repairs), len(samples) - len(kept))


def write_lines(samples: SampleFile, target: Path) -> None:
    """Write samples one a line, as they are written in the original.

    Args:
        samples: the original, of any size; a sample at a time is held in memory.
        target: the new file.

    Raises:
        FileExistsError: if there is a file of that name.
    """
    _write(target, (samples.raw(index) for index in range(len(samples))), len(samples))


def _write(target: Path, rows: Iterable[bytes], count: int) -> None:
    if target.exists():
        raise ExistingFileError(f"{target} exists and is left alone; move it away or remove it.")
    with atomic_file(target) as file:
        for row in tqdm(rows, total=count, desc=f"writing {target.name}", unit="sample", disable=None, leave=False):
            file.write(_LINE_BREAKS.sub(b" ", row.strip()) + b"\n")
