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
from ..source import select_samples
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
            skipped or no sample is left.
    """
    checked = survey_samples(
        samples,
        image_folder=image_folder,
        template=template,
        check_images=check_images,
        warnings=False,
        texts_first=bad_samples == "fail",
    )
    usable, problems = checked.usable, checked.problems
    counts = Counter(KINDS[problem.kind].title for problem in problems)
    kinds = ", ".join(f"{count:,} {title}" for title, count in counts.most_common())
    if problems and (bad_samples == "fail" or not len(usable)):
        raise InputError(
            f"{len(problems)} problems in the data ({kinds}), images in {image_folder}; correct or remove these "
            f"samples (`python -m integrations.llava data check` lists all, --fix writes a clean file), or set "
            f"data.bad_samples=skip to leave them out:{bulleted(problems)}"
        )
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
