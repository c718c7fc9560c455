"""From images and a prompt to what the model reads: all that can be done, and can go wrong, before it is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import LlavaProcessor, PreTrainedConfig

from integrations.llava._files import is_writable_text
from integrations.llava.checkpoints import load_config, load_processor
from integrations.llava.data import read_image, read_image_size
from integrations.llava.image_layout import ImageSize
from integrations.llava.modeling import FusedLlavaConfig, LayerfuseImageProcessor
from integrations.llava.prompts import EOS, IMAGE_TAG, Message, Template, TextEncoder, asked_ids, render, turns
from layerfuse.errors import InputError, InvalidTypeError, MissingFileError
from layerfuse.preprocessing import preprocessing_from_dict, tile_pixels
from layerfuse.preprocessing.pixels import image_size

from .pictures import Picture, PreparedPicture, RecentPictures, picture_name

__all__ = ["Images", "PreparedPrompts", "Preparer", "Prompt", "as_list", "as_turns", "load_preparer"]

Images = Picture | Sequence[Picture] | None
"""Images of a prompt: one, several, or none."""
Prompt = str | Sequence[Message]
"""A question; or a conversation whose last turn is the human's, with the model's earlier answers in it."""

# A text with more characters a position than this is looked at before it is tokenised whole.
_CHARACTERS = 32


class Preparer:
    """Writes prompts with the template stored in the checkpoint, exactly as in training, and prepares images.

    Attributes:
        fingerprint: 12 hexadecimal digits of a hash over template, tokenizer and preprocessing: what the model reads
            of a prompt and its images, and how its answer is spelled, follows from these.

    Raises:
        ValueError: if the checkpoint holds no prompt template, a processor of another kind, or one whose images take
            another number of tokens.
    """

    def __init__(self, config: FusedLlavaConfig, processor: LlavaProcessor) -> None:
        if config.prompt_template is None:
            raise InputError(
                "the checkpoint's config has no prompt_template, and no other name or file says which one the model "
                'was trained with. Save it there: model.config.prompt_template = get_template("v1").to_dict(), then '
                "save_model; templates are in integrations.llava.prompts."
            )
        if not isinstance(processor.image_processor, LayerfuseImageProcessor):
            raise InputError(
                f"the processor prepares images with {type(processor.image_processor).__name__}; expected "
                "LayerfuseImageProcessor, as build_processor makes it."
            )
        said = processor.image_processor.image_layout
        if said not in (None, config.layout.config):
            raise InputError(
                f"the processor prepares images for a model whose image_layout is {said}, and this model's is "
                f"{config.layout.config}; take the processor that was saved with the model."
            )
        assert isinstance(config.text_config, PreTrainedConfig)
        self.template = Template.from_dict(config.prompt_template)
        self.encoder = TextEncoder(processor.tokenizer, self.template.control_tokens)
        # What ends an answer, and what ends any text, as `end_answers` tells transformers.
        self.ends = [*dict.fromkeys(self.encoder.control(self.template.end or EOS) + self.encoder.control(EOS))]
        self.preprocessing = preprocessing_from_dict(processor.image_processor.preprocessing, upright=True)
        self.layout = config.layout
        self.with_condition = config.reads_questions
        self.image_token_id: int = config.image_token_index
        self.max_positions: int | None = getattr(config.text_config, "max_position_embeddings", None)
        self.fingerprint = self._fingerprint(processor)

    def _fingerprint(self, processor: LlavaProcessor) -> str:
        tokenizer = processor.tokenizer
        # Truncation and padding are states of a tokenizer that was used; no prompt is written with them.
        spelling = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        numbers = [self.image_token_id, self.layout.num_tokens(), self.encoder.begin, self.ends[0]]
        read = [self.template.to_dict(), self.preprocessing.to_dict(), numbers, sorted(tokenizer.all_special_ids)]
        read += [self.layout.config] if self.layout.depends_on_size else []
        return hashlib.sha256(json.dumps([read, spelling], sort_keys=True).encode()).hexdigest()[:12]

    def __call__(
        self, images: Images, prompt: Prompt, *, max_new_tokens: int = 1, recent: RecentPictures | None = None
    ) -> dict[str, Any]:
        """Write a prompt out and prepare its images; those that were prepared before are taken from `recent`.

        Returns:
            `input_ids` (T,) with images expanded; `pixel_values` (tiles of all images, C, height, width) uint8, which
            the preprocessing normalises, one tile an image unless the layout cuts it; `image_sizes`, (height, width)
            of each; `image_keys`, per image a text that is the same where the model makes the same of it; for a fuser
            that reads it, `condition`, per image the ids of the human's turns up to the one that shows it.

        Raises:
            ValueError: as `encode`, or if an image file cannot be read.
            TypeError: if an image is neither an image nor a path, or a prompt neither text nor turns.
            FileNotFoundError: if there is no such image file.
        """
        pictures = as_list(images)
        sizes = self.sizes(pictures)
        ids = self.encode(prompt, sizes, max_new_tokens=max_new_tokens)
        recent = recent or RecentPictures(0)
        prepared = [self._picture(own, size, recent) for own, size in zip(pictures, sizes, strict=True)]
        shape = (self.preprocessing.channels, *self.preprocessing.size)
        sample = {
            "input_ids": ids,
            "pixel_values": torch.cat([torch.empty(0, *shape, dtype=torch.uint8), *(own.tiles for own in prepared)]),
            "image_sizes": sizes,
            "image_keys": [own.key for own in prepared],
        }
        if not self.with_condition:
            return sample
        asked = asked_ids(as_turns(prompt), len(pictures), encoder=self.encoder, until_shown=True)
        keys = [f"{own.key} {ids}" for own, ids in zip(prepared, asked, strict=True)]
        return sample | {"image_keys": keys, "condition": [torch.tensor(own, dtype=torch.int64) for own in asked]}

    def _picture(self, picture: Picture, size: ImageSize | None, recent: RecentPictures) -> PreparedPicture:
        if (known := recent.find(picture)) is not None:
            return known
        opened = picture if isinstance(picture, Image.Image) else read_image(picture)
        tiles = tile_pixels(opened, self.preprocessing, None if size is None else self.layout.canvas(size))
        prepared = PreparedPicture(tiles.contiguous(), size)
        recent.keep(picture, prepared)
        return prepared

    def sizes(self, images: Sequence[Picture]) -> list[ImageSize | None]:
        """Read (height, width) of images in pixels, of files from their head; None for those that cannot be read."""
        upright = self.preprocessing.upright
        return [
            image_size(own, upright=upright) if isinstance(own, Image.Image) else read_image_size(own, upright=upright)
            for own in images
        ]

    def room(self, prompt: Prompt, image_sizes: Sequence[ImageSize | None]) -> int | None:
        """Count the positions that a prompt leaves to its answer; None where the language model names no limit."""
        return None if self.max_positions is None else self.max_positions - len(self._written(prompt, image_sizes))

    def encode(
        self, prompt: Prompt, image_sizes: Sequence[ImageSize | None], *, max_new_tokens: int = 1
    ) -> torch.Tensor:
        """Write a prompt out, up to where the answer begins, as T token ids with images expanded.

        Args:
            prompt: where it has no `<image>` tag, its images stand in front of its first turn.
            image_sizes: of its images, see `sizes`; if there are none, `<image>` is text.
            max_new_tokens: an answer's longest length, for which there has to be room behind the prompt: what a model
                writes beyond its last position means nothing.

        Raises:
            ValueError: if tags and images differ in number, turns do not alternate or end with the human's, the
                template cannot write the conversation, or it is longer, answer included, than the model can read.
            TypeError: if the prompt is neither text nor turns.
        """
        ids = self._written(prompt, image_sizes)
        if self.max_positions is not None and len(ids) + max_new_tokens > self.max_positions:
            left = self.max_positions - len(ids)
            images = int((ids == self.image_token_id).sum())
            shorter = f", or ask for answers of at most {left} tokens (max_new_tokens)" if left > 0 else ""
            raise InputError(
                f"the prompt takes up {len(ids)} positions ({images} of them its images) and its answer up to "
                f"{max_new_tokens}, and the model reads {self.max_positions}; shorten it, or leave out images{shorter}."
            )
        return ids

    def answer_ids(self, answer: str) -> list[int]:
        """Write an answer out as ids that stand behind a prompt of `encode`, as in training, but without its end."""
        asked = [{"from": "human", "value": ""}, {"from": "gpt", "value": answer}]
        rendered = render(
            asked,
            template=self.template,
            encoder=self.encoder,
            image_token_id=self.image_token_id,
            num_images=int(self.template.caption_only),
        )
        written = rendered.input_ids[len(rendered.input_ids) - rendered.num_supervised :]
        return written[:-1] if self.template.end else written

    def _written(self, prompt: Prompt, image_sizes: Sequence[ImageSize | None]) -> torch.Tensor:
        messages = _placed(as_turns(prompt), len(image_sizes))
        for message in messages:
            self._refuse_endless(message["value"])
        rendered = render(
            messages,
            template=self.template,
            encoder=self.encoder,
            image_token_id=self.image_token_id,
            num_images=len(image_sizes),
            answer_next=True,
        )
        return torch.tensor(self.layout.expand(rendered.input_ids, image_sizes))

    def _refuse_endless(self, text: str) -> None:
        """Refuse a text whose beginning is too long already; tokenised whole, 10 MB would take gigabytes."""
        if self.max_positions is None or len(text) <= _CHARACTERS * self.max_positions:
            return
        if len(self.encoder(text[: _CHARACTERS * self.max_positions])) > self.max_positions:
            raise InputError(
                f"a text of {len(text):,} characters takes up more positions than the {self.max_positions} that the "
                "model reads; shorten it."
            )


class PreparedPrompts(Dataset[dict[str, Any]]):
    """Prompts and the images of each, prepared with `prepare` when a batch asks for them."""

    def __init__(
        self, prepare: Preparer, prompts: Sequence[Prompt], images: Sequence[Images], *, max_new_tokens: int
    ) -> None:
        self.prepare, self.prompts, self.images, self.max_new_tokens = prepare, prompts, images, max_new_tokens
        self._recent = RecentPictures()

    def lengths(self) -> list[int]:
        """Count the positions that each prompt takes up, images included; errors are those of `Preparer.encode`."""
        sizes = [self.prepare.sizes(as_list(entry)) for entry in self.images]
        encode = partial(self.prepare.encode, max_new_tokens=self.max_new_tokens)
        return [len(ids) for ids in map(encode, self.prompts, sizes)]

    def groups(self) -> list[Hashable]:
        """Name the images of each prompt, so that those of the same may follow each other."""
        return [tuple(map(picture_name, as_list(entry))) for entry in self.images]

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        images, prompt = self.images[index], self.prompts[index]
        return self.prepare(images, prompt, max_new_tokens=self.max_new_tokens, recent=self._recent)


def as_list(images: Images) -> list[Picture]:
    """List the images of a prompt; a TypeError says what is no image, a FileNotFoundError what is no file."""
    several = isinstance(images, Sequence) and not isinstance(images, str)
    pictures: Any = images if several else [] if images is None else [images]
    for picture in pictures:
        if not isinstance(picture, Image.Image | str | Path):
            raise InvalidTypeError(
                f"an image is a {type(picture).__name__}; give a PIL image (Image.fromarray makes one of an array), "
                "the path of a file, several of these in a list, or None."
            )
        if not isinstance(picture, Image.Image) and not Path(picture).is_file():
            raise MissingFileError(f"image {picture} does not exist; give the path of a picture, or a PIL image.")
    return list(pictures)


def as_turns(prompt: Prompt) -> list[Message]:
    """A question, or a conversation, as turns in LLaVA's form; a ValueError or TypeError says what is none."""
    if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
        raise InvalidTypeError(
            f"a prompt is a {type(prompt).__name__}; give a text, or a list of turns {turns.FORM}.{_other_form(prompt)}"
        )
    messages: list[Message] = [{"from": "human", "value": prompt}] if isinstance(prompt, str) else [*prompt]
    for turn in messages:
        if not turns.is_turn(turn):
            raise InputError(f"a turn is {turn!r:.80}; write {turns.FORM}.{_other_form(turn)}")
        if not is_writable_text(turn["value"]):
            raise InputError(
                f"the text {turn['value'][:40]!r} holds half of a character (\\ud800 to \\udfff alone); write it whole."
            )
    return messages


def _other_form(value: object) -> str:
    if not isinstance(value, Mapping) or "role" not in value:
        return ""
    return (
        " Role and content are what chat APIs take: here 'user' is from 'human', 'assistant' is from 'gpt', the "
        "content's text is the value, and images are given beside the prompt."
    )


def _placed(messages: list[Message], num_images: int) -> list[Message]:
    """Put tags in front of a conversation that has none."""
    if not messages or messages[-1]["from"] != "human":
        raise InputError("a conversation has to end with the human's turn, which the model then answers.")
    found = turns.count_image_tags(messages, num_images)
    if num_images and not found:
        first = next(index for index, message in enumerate(messages) if message["from"] == "human")
        text = f"{IMAGE_TAG}\n" * num_images + messages[first]["value"]
        messages[first] = {**messages[first], "value": text}
    elif num_images and found != num_images:
        raise InputError(
            f"the prompt has {found} {IMAGE_TAG} tags for {num_images} images; write one tag per image, or none at "
            "all: then the images stand in front."
        )
    return messages


def load_preparer(folder: str | Path) -> Preparer:
    """Make the preparer of a folder's model, whose weights are not read; errors as `load_config` and `Preparer`."""
    return Preparer(load_config(folder), load_processor(folder))
