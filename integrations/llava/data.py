"""LLaVA's data format: read, check before training, prepare, and batch.

A sample is `{"id": …, "image": "name.jpg" | ["a.jpg", …] (optional), "conversations": [{"from": "human" | "gpt",
"value": text}, …]}`; a file is one JSON list of samples, or one sample a line (jsonl).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from layerfuse.preprocessing import Preprocessing

from .prompts import IGNORE_INDEX, IMAGE_TAG, Rendered, Template, TextEncoder, render

__all__ = ["Collator", "ConversationDataset", "Sample", "check_samples", "image_names", "read_samples"]

Sample = Mapping[str, Any]
"""One entry of a data file."""
CheckImages = Literal["decode", "size", "none"]

# Rendered conversations are kept for data sets up to this size; larger ones are tokenised when asked for.
_KEEP_RENDERED = 100_000
_SHOWN_PROBLEMS = 20
# A file that Pillow cannot open or decode raises one of these.
_IMAGE_ERRORS = (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def read_samples(path: str | Path) -> list[Sample]:
    """Read a json or jsonl file.

    Args:
        path: the file; `.jsonl` means one sample a line.

    Returns:
        The samples.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not JSON, or holds no samples.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"data file {path} does not exist; give a json or jsonl file in LLaVA's format.")
    text = path.read_text(encoding="utf-8")
    try:
        samples = (
            [json.loads(line) for line in text.splitlines() if line.strip()]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"data file {path} is not valid JSON: {error}.") from error
    if not isinstance(samples, list) or not samples:
        found = f"a {type(samples).__name__}" if not isinstance(samples, list) else "an empty list"
        raise ValueError(f"data file {path} holds {found}; it has to be a list of at least one sample.")
    return samples


def image_names(sample: Sample) -> tuple[str, ...]:
    """Names of a sample's images, in the order of their tags."""
    images = sample.get("image")
    return () if images is None else (images,) if isinstance(images, str) else tuple(images)


def check_samples(
    samples: Sequence[Sample],
    *,
    image_folder: str | Path,
    template: Template,
    check_images: CheckImages = "size",
) -> None:
    """Check everything that would otherwise stop a run half way.

    Args:
        samples: in LLaVA's format.
        image_folder: what image names are relative to.
        template: the prompt template they will be written with.
        check_images: decode every image, read only its header, or look only whether the file exists ("none" does
            not look at all).

    Raises:
        ValueError: listing the samples and image files at fault, and what is wrong with each.
    """
    problems = [
        f"sample {sample.get('id', index) if isinstance(sample, Mapping) else index!r}: {problem}"
        for index, sample in enumerate(samples)
        for problem in _conversation_problems(sample, template)
    ]
    if not problems and check_images != "none":
        names = dict.fromkeys(name for sample in samples for name in image_names(sample))
        bar = tqdm(names, desc="checking images", unit="image", disable=None, leave=False)
        problems = [problem for name in bar for problem in _image_problems(Path(image_folder) / name, check_images)]
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN_PROBLEMS])
        more = f"\n  … and {len(problems) - _SHOWN_PROBLEMS} more" if len(problems) > _SHOWN_PROBLEMS else ""
        raise ValueError(f"{len(problems)} problems in the data; correct or remove these samples:{shown}{more}")


def _conversation_problems(sample: Sample, template: Template) -> Iterator[str]:
    messages = sample.get("conversations") if isinstance(sample, Mapping) else None
    if not isinstance(messages, list) or not messages:
        yield "has no 'conversations', a list of turns"
        return
    well_formed = all(
        isinstance(turn, Mapping) and turn.get("from") in ("human", "gpt") and isinstance(turn.get("value"), str)
        for turn in messages
    )
    if not well_formed:
        yield "has a turn that is not {'from': 'human' | 'gpt', 'value': text}"
        return
    turns = messages[1:] if messages[0]["from"] == "gpt" else messages
    roles = [turn["from"] for turn in turns]
    if len(roles) < 2 or roles != (["human", "gpt"] * len(roles))[: len(roles)]:
        yield f"turns are {', '.join(roles) or 'missing'}; they have to alternate human, gpt, human, gpt, …"
    num_images = len(image_names(sample))
    tags = [turn["value"].count(IMAGE_TAG) for turn in turns if turn["from"] == "human"]
    # With one image, several tags in one message count as one: they are moved to its front.
    found = sum(map(bool, tags)) if num_images == 1 else sum(tags)
    if found != num_images:
        yield f"has {num_images} images but {found} {IMAGE_TAG} tags in the human's turns"
    if template.caption_only and (num_images == 0 or len(turns) != 2):
        yield f"template {template.name!r} takes one question and one answer about an image"


def _image_problems(path: Path, check_images: CheckImages) -> Iterator[str]:
    if not path.is_file():
        yield f"image {path}: missing"
        return
    try:
        with Image.open(path) as image:
            if check_images == "decode":
                image.load()
    except _IMAGE_ERRORS as error:
        yield f"image {path}: corrupt ({error})"


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
        cache_images: MiB of prepared images kept in memory.
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
        cache_images: int = 256,
    ) -> None:
        self.samples = samples
        self.image_folder = Path(image_folder)
        self.template = template
        self.encoder = encoder
        self.preprocessing = preprocessing
        self.image_token_id = image_token_id
        self.num_image_tokens = num_image_tokens
        self.max_length = max_length
        height, width = preprocessing.size
        self._images: dict[str, np.ndarray] = {}
        self._max_images = cache_images * 2**20 // (height * width * 3)
        self._texts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._mean = torch.tensor(preprocessing.mean).view(3, 1, 1)
        self._std = torch.tensor(preprocessing.std).view(3, 1, 1)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Prepare a sample.

        Returns:
            `input_ids` and `labels` (T,), `pixel_values` (images, 3, height, width).

        Raises:
            ValueError: if its images do not fit into `max_length`, or an image cannot be read.
        """
        input_ids, labels = self._text(index)
        names = image_names(self.samples[index])
        height, width = self.preprocessing.size
        pixels = torch.stack([self._image(name) for name in names]) if names else torch.empty(0, 3, height, width)
        return {"input_ids": input_ids, "labels": labels, "pixel_values": pixels}

    @property
    def lengths(self) -> list[int]:
        """Words of each sample, as the published sampler counts them; negative for samples without image."""
        words = [max(1, sum(len(turn["value"].split()) for turn in sample["conversations"])) for sample in self.samples]
        return [count if image_names(sample) else -count for count, sample in zip(words, self.samples, strict=True)]

    def render(self, index: int) -> Rendered:
        """Write a sample out; images are one token each."""
        sample = self.samples[index]
        return render(
            sample["conversations"],
            template=self.template,
            encoder=self.encoder,
            image_token_id=self.image_token_id,
            num_images=len(image_names(sample)),
        )

    def _text(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index in self._texts:
            return self._texts[index]
        rendered = self.render(index)
        ids = torch.tensor(rendered.input_ids)
        repeats = torch.where(ids == self.image_token_id, self.num_image_tokens, 1)
        input_ids = ids.repeat_interleave(repeats)
        labels = torch.tensor(rendered.labels).repeat_interleave(repeats)
        if (input_ids[self.max_length :] == self.image_token_id).any():
            raise ValueError(
                f"sample {self.samples[index].get('id', index)}: its images do not fit into max_length="
                f"{self.max_length} (an image takes {self.num_image_tokens} positions); raise max_length or remove it."
            )
        text = input_ids[: self.max_length], labels[: self.max_length]
        if len(self.samples) <= _KEEP_RENDERED:
            self._texts[index] = text
        return text

    def _image(self, name: str) -> torch.Tensor:
        pixels = self._images.get(name)
        if pixels is None:
            path = self.image_folder / name
            try:
                with Image.open(path) as image:
                    pixels = np.array(self.preprocessing.fit(image), dtype=np.uint8)
            except _IMAGE_ERRORS as error:
                raise ValueError(f"image {path} cannot be read: {error}.") from error
            if len(self._images) < self._max_images:
                self._images[name] = pixels
        return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - self._mean) / self._std


class Collator:
    """Joins samples to a batch.

    Args:
        pad_token_id: fills short samples up.
        side: where: "right" for training, "left" for generation.
    """

    def __init__(self, pad_token_id: int, *, side: Literal["right", "left"] = "right") -> None:
        self.pad_token_id = pad_token_id
        self.side = side

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad and stack.

        Args:
            samples: as `ConversationDataset` gives them; `labels` may be left out of all.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, T); `pixel_values` (images, 3, height, width) if there are any.
        """
        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": self._pad(ids, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(row) for row in ids], 0),
        }
        if "labels" in samples[0]:
            batch["labels"] = self._pad([sample["labels"] for sample in samples], IGNORE_INDEX)
        pixels = torch.cat([sample["pixel_values"] for sample in samples])
        if len(pixels):
            batch["pixel_values"] = pixels
        return batch

    def _pad(self, rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            list(rows), batch_first=True, padding_value=value, padding_side=self.side
        )
