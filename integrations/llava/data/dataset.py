"""Samples prepared for the model: ids, labels and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from integrations.llava.image_layout import ImageLayout, ImageSize
from integrations.llava.prompts import IGNORE_INDEX, Rendered, Template, TextEncoder, asked_ids, render
from layerfuse.errors import InputError, MissingFileError
from layerfuse.features import FeatureMaps
from layerfuse.preprocessing import AnyPreprocessing, tile_pixels
from layerfuse.preprocessing.pixels import image_size

from .doctor.policy import BadSamples
from .feature_cache import FeatureCache, picture_digest
from .image_sizes import grouping_lengths
from .images import read_image
from .samples import Sample, image_names, sample_id
from .source import file_index, image_places

__all__ = ["BadSampleError", "ConversationDataset"]

# Bytes of tokenised texts that are kept: a small data set is tokenised once; a large one is passed over once anyway.
_KEEP_RENDERED = 64 * 2**20


class BadSampleError(InputError):
    """A sample that passed the check but cannot be read now."""


class ConversationDataset(Dataset[dict[str, Any]]):
    """Samples as ids, labels and pixels.

    Args:
        samples: checked samples.
        image_folder: what image names are relative to.
        template: how conversations are written; `encoder` tokenises them.
        preprocessing: how images are prepared; `layout` says how many tokens each takes.
        max_length: longer samples are cut, T positions with images expanded.
        bad_samples: "skip" gives a void sample, without pixels and labels, where one cannot be read.
        with_condition: whether samples say what is asked about their images, for a fuser that reads it.
        cache: has feature maps of images, which are given in place of their pixels.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        image_folder: str | Path,
        template: Template,
        encoder: TextEncoder,
        preprocessing: AnyPreprocessing,
        layout: ImageLayout,
        max_length: int = 2048,
        bad_samples: BadSamples = "fail",
        with_condition: bool = False,
        cache: FeatureCache | None = None,
    ) -> None:
        self.samples = samples
        self.image_folder = Path(image_folder)
        self.places = image_places(samples, image_folder)
        self.template = template
        self.encoder = encoder
        self.preprocessing = preprocessing
        self.layout = layout
        self.max_length = max_length
        self.bad_samples = bad_samples
        self.with_condition = with_condition
        self.cache = cache
        self._texts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._text_bytes = 0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Prepare a sample.

        Returns:
            `id`; `input_ids` and `labels` (T,); `pixel_values` (tiles of all images, C, height, width) uint8, which the
            model normalises, one tile an image unless the layout cuts it; `image_sizes`, (height, width) of each image
            before that; if asked for, `condition`, per image the ids of the human's turns. A void sample, see
            `bad_samples`, also has `skipped`, the reason. With a cache, `pixel_values` are of images that it lacks,
            `feature_maps` of the others, and `uncached` says of each tile of all images if it is one of the former.

        Raises:
            BadSampleError: if its images do not fit into `max_length`, cannot be read, or are not those that its text
                has tags for.
        """
        sample = self.samples[index]
        prepared: dict[str, Any] = {"id": sample_id(sample, file_index(self.samples, index))}
        images: list[tuple[torch.Tensor | FeatureMaps, ImageSize]] = []
        try:
            rendered, asked = self._rendered(index)
            images = [self._cached(name) or self.pixels(name) for name in image_names(sample)]
            ids, labels = self._expanded(rendered, [size for _, size in images])
        except InputError as error:
            reason = f"sample {prepared['id']}: {error}"
            if self.bad_samples == "fail":
                raise BadSampleError(reason) from error
            # One position, so that every process still takes the same number of steps.
            ids, images, asked = np.array(self.encoder.begin[:1] or [self.encoder.end]), [], np.empty((0, 0))
            labels = np.full_like(ids, IGNORE_INDEX)
            prepared["skipped"] = reason
        prepared["input_ids"], prepared["labels"] = (torch.from_numpy(v.astype(np.int64)) for v in (ids, labels))
        pixels = [image for image, _ in images if isinstance(image, torch.Tensor)]
        if self.cache is not None:
            prepared["feature_maps"] = [image for image, _ in images if isinstance(image, FeatureMaps)]
            prepared["uncached"] = [isinstance(image, torch.Tensor) for image, _ in images for _ in _tiles(image)]
        shape = (self.preprocessing.channels, *self.preprocessing.size)
        prepared["pixel_values"] = torch.cat(pixels) if pixels else torch.empty(0, *shape, dtype=torch.uint8)
        prepared["image_sizes"] = [size for _, size in images]
        if self.with_condition:
            prepared["condition"] = [torch.from_numpy(ids.astype(np.int64)) for ids in asked]
        return prepared

    @property
    def lengths(self) -> list[int]:
        """Lengths by which batches are grouped, see `grouping_lengths`; negative for samples without image."""
        return grouping_lengths(self.samples, self.layout, self.image_folder, upright=self.preprocessing.upright)

    def render(self, index: int) -> Rendered:
        """Write a sample out; images are one token each."""
        sample = self.samples[index]
        return render(
            sample["conversations"],
            template=self.template,
            encoder=self.encoder,
            image_token_id=self.layout.image_token_id,
            num_images=len(image_names(sample)),
            max_length=self.max_length,
        )

    def _expanded(self, rendered: np.ndarray, sizes: Sequence[ImageSize]) -> np.ndarray:
        """(2, T) ids and labels, T at most `max_length`."""
        repeats = self.layout.repeats(rendered[0].tolist(), sizes)
        expanded = np.repeat(rendered, repeats, axis=1)
        if (expanded[0, self.max_length :] == self.layout.image_token_id).any():
            raise InputError(
                f"its images do not fit into max_length={self.max_length} (they take "
                f"{sum(map(self.layout.num_tokens, sizes))} positions); raise max_length or remove it."
            )
        # The published code cuts before and after it expands images, each time at the same length: what is left is the
        # same, since no position moves left.
        return expanded[:, : self.max_length]

    def _rendered(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(2, T) int32, ids and labels, one position per image; and, if asked for, (images, Q), what is asked of each.

        Of a conversation, all images are asked the same.
        """
        kept = self._texts.get(index)
        if kept is None:
            rendered = self.render(index)
            asked = self._asked(self.samples[index]) if self.with_condition else []
            texts = ([rendered.input_ids, rendered.labels], asked)
            ids, condition = (np.array(text, dtype=np.int32) for text in texts)
            kept = ids, condition
            if self._text_bytes + ids.nbytes + condition.nbytes <= _KEEP_RENDERED:
                self._texts[index] = kept
                self._text_bytes += ids.nbytes + condition.nbytes
        return kept

    def _asked(self, sample: Sample) -> list[list[int]]:
        """Ids of what is asked about each image."""
        turns, count = sample["conversations"], len(image_names(sample))
        return asked_ids(turns, count, encoder=self.encoder, until_shown=False, at_most=self.max_length)

    def _cached(self, name: str) -> tuple[FeatureMaps, ImageSize] | None:
        """Maps of an image that the cache has, and its size; a file that cannot be read has none."""
        if self.cache is None:
            return None
        try:
            digest = picture_digest(self.places / name)
        except (OSError, ValueError):
            return None
        return self.cache.read(digest)

    def pixels(self, name: str) -> tuple[torch.Tensor, ImageSize]:
        """Prepare an image: (tiles, C, height, width), and its height and width before that; a ValueError if not."""
        path = self.places / name
        try:
            image = read_image(path)
        except MissingFileError as error:
            raise InputError(f"image {path} cannot be read: it is missing.") from error
        size = image_size(image, upright=self.preprocessing.upright)
        return tile_pixels(image, self.preprocessing, self.layout.canvas(size)), size


def _tiles(image: torch.Tensor | FeatureMaps) -> torch.Tensor:
    return image[0] if isinstance(image, FeatureMaps) else image
