"""What training does about samples that it cannot use: fail, or leave them out and say so."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from integrations.llava._text import bulleted
from integrations.llava.prompts import Template
from layerfuse.errors import InputError

from ..samples import Sample
from ..source import as_source, select_samples
from .findings import KINDS, Finding
from .images import CheckImages
from .survey import survey_samples

__all__ = ["BadSamples", "check_samples", "usable_indices", "usable_samples"]

BadSamples = Literal["fail", "skip"]
"""Stop at a sample that cannot be used, or leave it out."""

_log = logging.getLogger(__name__)


def check_samples(
    samples: Sequence[Sample], *, image_folder: str | Path, template: Template, check_images: CheckImages = "size"
) -> None:
    """Raise the error of `usable_indices` if any sample cannot be used."""
    usable_indices(samples, image_folder=image_folder, template=template, check_images=check_images)


def usable_indices(
    samples: Sequence[Sample],
    *,
    image_folder: str | Path,
    template: Template,
    check_images: CheckImages = "size",
    bad_samples: BadSamples = "fail",
) -> tuple[np.ndarray, list[Finding]]:
    """Indices (int64, in order) of the samples that training can use, and the problems of the others.

    One process of a run is enough; the indices are all that the others need. Samples, image folder, template and
    `check_images` are as of `survey_samples`; `bad_samples="skip"` leaves samples out and logs how many.

    Raises:
        ValueError: listing the samples and image files at fault, and what is wrong with each, if they shall not be
            skipped or no sample is left; or if there is no image folder, and samples name images.
    """
    no_folder = not as_source(samples).images_inside and not Path(image_folder).is_dir()
    checked = survey_samples(
        samples,
        image_folder=image_folder,
        template=template,
        check_images="none" if no_folder else check_images,
        warnings=False,
    )
    names_images = any(source.num_images for source in checked.sources.values())
    lacking = ""
    if no_folder and names_images:
        lacking = (
            f"the image folder {image_folder} does not exist, so no image was looked at; give an existing one "
            "(--image-folder)."
        )
    usable, problems = checked.usable, checked.problems
    counts = Counter(KINDS[problem.kind].title for problem in problems)
    kinds = ", ".join(f"{count:,} {title}" for title, count in counts.most_common())
    if problems and (bad_samples == "fail" or not len(usable)):
        where = image_folder or "the working folder, since no image folder was given (--image-folder)"
        told = (
            f"{len(problems):,} problems in the data ({kinds}), images in {where}; correct or remove these samples "
            "(`python -m integrations.llava data check` lists all, --fix writes a clean file), or leave them out "
            f"(--bad-samples skip; in a recipe data.bad_samples: skip):{bulleted(problems)}"
        )
        raise InputError(f"{lacking} And: {told}" if lacking else told)
    if lacking:
        raise InputError(lacking)
    if problems:
        left_out = f"{len(samples) - len(usable):,} of {len(samples):,} samples are left out"
        _log.warning("%s: %s; first: %s", left_out, kinds, problems[0])
    return usable, problems


def usable_samples(
    samples: Sequence[Sample],
    *,
    image_folder: str | Path,
    template: Template,
    check_images: CheckImages = "size",
    bad_samples: BadSamples = "fail",
) -> tuple[Sequence[Sample], list[Finding]]:
    """As `usable_indices`, but the samples themselves: all of them, or a `Selection`."""
    usable, problems = usable_indices(
        samples, image_folder=image_folder, template=template, check_images=check_images, bad_samples=bad_samples
    )
    return select_samples(samples, usable), problems
