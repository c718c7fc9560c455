"""Data of any form written as LLaVA's: `samples.jsonl`, and its images as files in `images/` beside it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from layerfuse.errors import ExistingFileError, FileAccessError

from .images import open_image
from .places import ImagePlace
from .samples import image_names
from .source import SampleSource, image_places

__all__ = ["Converted", "convert_samples", "refuse_existing"]


@dataclass(frozen=True)
class Converted:
    """A folder that was written: numbers of its samples and of the different images that they name."""

    folder: Path
    num_samples: int
    num_images: int


def refuse_existing(folder: Path) -> None:
    """Raise a FileExistsError if there is something of that name."""
    if os.path.lexists(folder):
        raise ExistingFileError(f"{folder} exists and is left alone; give another folder, or move it away.")


def convert_samples(
    samples: SampleSource, indices: Sequence[int] | np.ndarray, folder: Path, *, image_folder: str | Path
) -> Converted:
    """Write samples, and copies of the images that they name, into a new folder, which appears whole or not at all.

    Args:
        samples: of any form.
        indices: of those that are written, in this order; they have been checked.
        folder: the new one.
        image_folder: what image names are relative to that are not inside the samples' files.

    Raises:
        FileExistsError: if there is something of that name.
        OSError: if it cannot be written; nothing is left behind then.
    """
    refuse_existing(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    except OSError as error:
        raise FileAccessError(f"{folder} cannot be written ({error.strerror}); give another folder.") from error
    try:
        names = _write(samples, indices, scratch, image_folder)
        scratch.chmod(0o755)  # a scratch folder is its owner's alone
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Converted(folder, len(indices), names)


def _write(samples: SampleSource, indices: Sequence[int] | np.ndarray, folder: Path, image_folder: str | Path) -> int:
    places, files = image_places(samples, image_folder), dict[str, str]()
    (folder / "images").mkdir()
    with (folder / "samples.jsonl").open("w", encoding="utf-8", newline="\n") as table:
        for index in tqdm(indices, desc=f"writing {folder.name}", unit="sample", disable=None, leave=False):
            sample = samples[int(index)]
            names = image_names(sample)
            for name in names:
                if name not in files:
                    files[name] = _file_name(name, places / name)
                    target = folder / "images" / files[name]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes((places / name).read_bytes())
            written = [files[name] for name in names]
            image = {"image": written[0] if isinstance(sample["image"], str) else written} if names else {}
            table.write(json.dumps({**sample, **image}, ensure_ascii=False) + "\n")
    return len(files)


def _file_name(name: str, place: ImagePlace) -> str:
    """Name of a copy: that of the image, with the ending of its content where it has none of a picture."""
    name = os.path.normpath(name).lstrip("/")
    if os.path.splitext(name)[1].lower() in Image.registered_extensions():
        return name
    with open_image(place) as image:
        return f"{name}.{(image.format or 'img').lower().replace('jpeg', 'jpg')}"
