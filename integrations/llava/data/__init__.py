"""LLaVA's data format: files of samples, their images, prepared and batched. `doctor` checks them."""

from __future__ import annotations

from .collate import Collator
from .converting import convert_samples, refuse_existing
from .dataset import BadSampleError, ConversationDataset
from .doctor import Survey, survey_samples, usable_indices
from .doctor.findings import Finding
from .doctor.policy import check_samples, usable_samples
from .feature_cache import FeatureCache, open_feature_cache, tile_bytes
from .files import SampleFile
from .image_sizes import grouping_lengths, sample_image_sizes
from .images import read_image, read_image_size
from .opening import SampleMix, read_samples
from .places import is_outside
from .samplers import ModalityLengthSampler, ShuffleSampler
from .samples import Sample, image_names, linked_media, unread_media
from .source import SampleSource, Selection, drawn_evenly, sample_lengths, select_samples, source_of
from .uncached_images import UncachedImage, prepare_uncached, uncached_images

__all__ = [
    "BadSampleError",
    "Collator",
    "ConversationDataset",
    "FeatureCache",
    "Finding",
    "ModalityLengthSampler",
    "Sample",
    "SampleFile",
    "SampleMix",
    "SampleSource",
    "Selection",
    "ShuffleSampler",
    "Survey",
    "UncachedImage",
    "check_samples",
    "convert_samples",
    "drawn_evenly",
    "grouping_lengths",
    "image_names",
    "is_outside",
    "linked_media",
    "open_feature_cache",
    "prepare_uncached",
    "read_image",
    "read_image_size",
    "read_samples",
    "refuse_existing",
    "sample_image_sizes",
    "sample_lengths",
    "select_samples",
    "source_of",
    "survey_samples",
    "tile_bytes",
    "uncached_images",
    "unread_media",
    "usable_indices",
    "usable_samples",
]
