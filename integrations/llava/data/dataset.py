"""Samples prepared for the model: ids, labels and pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from integrations.llava.prompts import IGNORE_INDEX, Rendered, Template, TextEncoder, render
from layerfuse.errors import InputError, MissingFileError
from layerfuse.preprocessing import Preprocessing

from ..images import UnreadableImageError, read_image
from .conversations import expand_images
from .files import file_index, sample_lengths
from .policy import BadSamples
from .samples import Sample, image_names, sample_id

__all__ = ["BadSampleError", "ConversationDataset"]

# Tokenised texts are kept as long as they fit: a small data set is tokenised once, and of a large one, which is passed
# over once, next to nothing is kept.
_KEEP_RENDERED = 64 * 2**20


class BadSampleError(InputError):
    """A sample that passed the check but cannot be read now."""


class ConversationDataset(Dataset[dict[str, Any]]):
    """Samples as ids, labels and pixels.

    Args:
        samples: checked samples.
        image_folder: what image names are relative to.
        template: how conversations are written.
        encoder: how they are tokenised.
        preprocessing: how images are prepared.
        image_token_id: id of `<image>`.
        num_image_tokens: positions an image takes up.
        max_length: longer samples are cut, T positions with images expanded.
        bad_samples: "skip" gives a void sample, without pixels and labels, where one cannot be read.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        image_folder: str | Path,
        template: Template,
        encoder: TextEncoder,
        preprocessing: Preprocessing,
        image_token_id: int,
        num_image_tokens: int,
        max_length: int = 2048,
        bad_samples: BadSamples = "fail",
    ) -> None:
        self.samples = samples
        self.image_folder = Path(image_folder)
        self.template = template
        self.encoder = encoder
        self.preprocessing = preprocessing
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens
        self.max_length = max_length
        self.bad_samples = bad_samples
        self._texts: dict[int, np.ndarray] = {}
        self._text_bytes = 0
        self._mean = torch.tensor(preprocessing.mean).view(3, 1, 1)
        self._std = torch.tensor(preprocessing.std).view(3, 1, 1)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Prepare a sample.

        Returns:
            `id`; `input_ids` and `labels` (T,); `pixel_values` (images, 3, height, width). A void sample, see
            `bad_samples`, also has `skipped`, the reason.

        Raises:
            BadSampleError: if its images do not fit into `max_length`, or an image cannot be read.
        """
        sample = self.samples[index]
        own_id = sample_id(sample, file_index(self.samples, index))
        height, width = self.preprocessing.size
        try:
            input_ids, labels = self._text(index, own_id)
            pixels = [self._image(name, own_id) for name in image_names(sample)]
        except BadSampleError as error:
            if self.bad_samples == "fail":
                raise
            # One position, so that every process still takes the same number of steps.
            begin = torch.tensor(self.encoder.begin[:1] or [self.encoder.end])
            void = {"input_ids": begin, "labels": torch.full_like(begin, IGNORE_INDEX)}
            return {"id": own_id, **void, "pixel_values": torch.empty(0, 3, height, width), "skipped": str(error)}
        stacked = torch.stack(pixels) if pixels else torch.empty(0, 3, height, width)
        return {"id": own_id, "input_ids": input_ids, "labels": labels, "pixel_values": stacked}

    @property
    def lengths(self) -> list[int]:
        """Words of each sample, as the published sampler counts them; negative for samples without image."""
        lengths: list[int] = sample_lengths(self.samples).tolist()
        return lengths

    def render(self, index: int) -> Rendered:
        """Write a sample out; images are one token each."""
        sample = self.samples[index]
        return render(
            sample["conversations"],
            template=self.template,
            encoder=self.encoder,
            image_token_id=self.image_token_id,
            num_images=len(image_names(sample)),
            max_length=self.max_length,
        )

    def _text(self, index: int, own_id: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = expand_images(
            *self._rendered(index, own_id), image_id=self.image_token_id, num_image_tokens=self.num_image_tokens
        )
        if (ids[self.max_length :] == self.image_token_id).any():
            raise BadSampleError(
                f"sample {own_id}: its images do not fit into max_length={self.max_length} (an image takes "
                f"{self.num_image_tokens} positions); raise max_length or remove it."
            )
        # The published code cuts before and after it expands images, each time at the same length: what is left is the
        # same, since no position moves left.
        return _long(ids[: self.max_length]), _long(labels[: self.max_length])

    def _rendered(self, index: int, own_id: str) -> np.ndarray:
        """(2, T) int32: ids and labels, one position per image."""
        kept = self._texts.get(index)
        if kept is None:
            try:
                rendered = self.render(index)
            except InputError as error:
                raise BadSampleError(f"sample {own_id}: {error}") from error
            kept = np.array([rendered.input_ids, rendered.labels], dtype=np.int32)
            if self._text_bytes + kept.nbytes <= _KEEP_RENDERED:
                self._texts[index] = kept
                self._text_bytes += kept.nbytes
        return kept

    def _image(self, name: str, own_id: str) -> torch.Tensor:
        path = self.image_folder / name
        try:
            pixels = np.array(self.preprocessing.fit(read_image(path)), dtype=np.uint8)
        except UnreadableImageError as error:
            raise BadSampleError(f"sample {own_id}: {error}") from error
        except MissingFileError as error:
            raise BadSampleError(f"sample {own_id}: image {path} cannot be read: it is missing.") from error
        return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - self._mean) / self._std


def _long(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))
