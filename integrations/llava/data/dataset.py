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
from layerfuse.preprocessing import Preprocessing
from layerfuse.preprocessing.pixels import image_size

from .doctor.policy import BadSamples
from .files import file_index, sample_lengths
from .images import UnreadableImageError, read_image
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
        layout: how many tokens an image takes.
        max_length: longer samples are cut, T positions with images expanded.
        bad_samples: "skip" gives a void sample, without pixels and labels, where one cannot be read.
        with_condition: whether samples say what is asked about their images, for a fuser that reads it.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        image_folder: str | Path,
        template: Template,
        encoder: TextEncoder,
        preprocessing: Preprocessing,
        layout: ImageLayout,
        max_length: int = 2048,
        bad_samples: BadSamples = "fail",
        with_condition: bool = False,
    ) -> None:
        self.samples = samples
        self.image_folder = Path(image_folder)
        self.template = template
        self.encoder = encoder
        self.preprocessing = preprocessing
        self.layout = layout
        self.max_length = max_length
        self.bad_samples = bad_samples
        self.with_condition = with_condition
        self._texts: dict[int, np.ndarray] = {}
        self._text_bytes = 0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Prepare a sample.

        Returns:
            `id`; `input_ids` and `labels` (T,); `pixel_values` (images, 3, height, width); `image_sizes` (images, 2),
            height and width before that; if asked for, `condition`, per image the ids of the human's turns. A void
            sample, see `bad_samples`, also has `skipped`, the reason.

        Raises:
            BadSampleError: if its images do not fit into `max_length`, cannot be read, or are not those that its text
                has tags for.
        """
        sample = self.samples[index]
        own_id = sample_id(sample, file_index(self.samples, index))
        try:
            rendered = self._rendered(index, own_id)
            images = [self._image(name, own_id) for name in image_names(sample)]
            input_ids, labels = self._expanded(rendered, [size for _, size in images], own_id)
            condition = self._condition(sample, own_id)
        except BadSampleError as error:
            if self.bad_samples == "fail":
                raise
            # One position, so that every process still takes the same number of steps.
            begin = torch.tensor(self.encoder.begin[:1] or [self.encoder.end])
            void = {"input_ids": begin, "labels": torch.full_like(begin, IGNORE_INDEX)}
            unasked: dict[str, Any] = {"condition": []} if self.with_condition else {}
            return {"id": own_id, **void, **self._stacked([]), **unasked, "skipped": str(error)}
        return {"id": own_id, "input_ids": input_ids, "labels": labels, **self._stacked(images), **condition}

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
            image_token_id=self.layout.image_token_id,
            num_images=len(image_names(sample)),
            max_length=self.max_length,
        )

    def _expanded(
        self, rendered: np.ndarray, sizes: Sequence[ImageSize], own_id: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            repeats = self.layout.repeats(rendered[0].tolist(), sizes)
        except InputError as error:
            raise BadSampleError(f"sample {own_id}: {error}") from error
        ids, labels = np.repeat(rendered, repeats, axis=1)
        if (ids[self.max_length :] == self.layout.image_token_id).any():
            raise BadSampleError(
                f"sample {own_id}: its images do not fit into max_length={self.max_length} (they take "
                f"{sum(map(self.layout.num_tokens, sizes))} positions); raise max_length or remove it."
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

    def _condition(self, sample: Sample, own_id: str) -> dict[str, list[torch.Tensor]]:
        if not self.with_condition:
            return {}
        turns, count = sample["conversations"], len(image_names(sample))
        try:
            asked = asked_ids(turns, count, encoder=self.encoder, until_shown=False, at_most=self.max_length)
        except InputError as error:
            raise BadSampleError(f"sample {own_id}: {error}") from error
        return {"condition": [torch.tensor(ids, dtype=torch.int64) for ids in asked]}

    def _image(self, name: str, own_id: str) -> tuple[torch.Tensor, ImageSize]:
        path = self.image_folder / name
        try:
            image = read_image(path)
            prepared = self.preprocessing(image)
        except UnreadableImageError as error:
            raise BadSampleError(f"sample {own_id}: {error}") from error
        except MissingFileError as error:
            raise BadSampleError(f"sample {own_id}: image {path} cannot be read: it is missing.") from error
        return prepared, image_size(image, upright=self.preprocessing.upright)

    def _stacked(self, images: Sequence[tuple[torch.Tensor, ImageSize]]) -> dict[str, torch.Tensor]:
        none = torch.empty(0, 3, *self.preprocessing.size)
        pixels = torch.stack([pixels for pixels, _ in images]) if images else none
        sizes = [size for _, size in images]
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes, dtype=torch.int64).view(-1, 2)}


def _long(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))
