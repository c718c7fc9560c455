"""LLaVA's data format: read, check before training, prepare, and batch.

`files` opens data files, `survey` checks them (the data doctor), `policy` says what training does about bad samples,
`dataset` and `collator` prepare and batch.
"""

from __future__ import annotations

from .collator import Collator
from .dataset import BadSampleError, ConversationDataset
from .files import SampleFile, Selection, read_samples, sample_lengths, select_samples
from .findings import Finding
from .policy import check_samples, usable_indices, usable_samples
from .samples import Sample, image_names
from .survey import Survey, survey_samples

__all__ = [
    "BadSampleError",
    "Collator",
    "ConversationDataset",
    "Finding",
    "Sample",
    "SampleFile",
    "Selection",
    "Survey",
    "check_samples",
    "image_names",
    "read_samples",
    "sample_lengths",
    "select_samples",
    "survey_samples",
    "usable_indices",
    "usable_samples",
]
