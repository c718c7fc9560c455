"""From images and a prompt to what the model reads: all that can be done, and can go wrong, before it is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import LlavaProcessor, PreTrainedConfig

from layerfuse.errors import InputError
from layerfuse.preprocessing import Preprocessing

from .checkpoint import load_config, load_processor
from .model import FusedLlavaConfig
from .processing import LayerfuseImageProcessor
from .prompts import IMAGE_TAG, Message, Template, TextEncoder, render

__all__ = ["Images", "Preparer", "Prompt", "as_list", "load_preparer"]

Images = Image.Image | Sequence[Image.Image] | None
"""What belongs to a prompt: an image, several, or none."""
Prompt = str | Sequence[Message]
"""A question; or a conversation whose last turn is the human's, with the model's earlier answers in it."""


class Preparer:
    """Writes prompts with the template stored in the checkpoint, exactly as in training, and prepares images.

    Args:
        config: the model's; holds its prompt template.
        processor: the one saved beside the model.

    Raises:
        ValueError: if the checkpoint holds no prompt template, or a processor of another kind.
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
        assert isinstance(config.text_config, PreTrainedConfig)
        self.template = Template(**config.prompt_template)
        self.encoder = TextEncoder(processor.tokenizer)
        self.preprocessing = Preprocessing.from_dict(processor.image_processor.preprocessing)
        self.image_token_id: int = config.image_token_index
        self.num_image_tokens: int = config.image_seq_length
        self.max_positions: int | None = getattr(config.text_config, "max_position_embeddings", None)

    def __call__(self, images: Images, prompt: Prompt) -> dict[str, torch.Tensor]:
        """Write a prompt out and prepare its images.

        Returns:
            `input_ids` (T,) with images expanded, `pixel_values` (images, 3, height, width).

        Raises:
            ValueError: as `encode`.
        """
        pictures = as_list(images)
        return {"input_ids": self.encode(prompt, len(pictures)), "pixel_values": self.pixels(pictures)}

    def pixels(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Prepare a prompt's images: (images, 3, height, width)."""
        return self.preprocessing.batch(images) if images else torch.empty(0, 3, *self.preprocessing.size)

    def encode(self, prompt: Prompt, num_images: int) -> torch.Tensor:
        """Write a prompt out, up to where the answer begins.

        Args:
            prompt: where it has no `<image>` tag, its images stand in front of its first turn.
            num_images: images that belong to it; with 0, `<image>` is text.

        Returns:
            T token ids, images expanded.

        Raises:
            ValueError: if tags and images differ in number, turns do not alternate or end with the human's, the
                template cannot write the conversation, or it is longer than the model can read.
        """
        rendered = render(
            _messages(prompt, num_images),
            template=self.template,
            encoder=self.encoder,
            image_token_id=self.image_token_id,
            num_images=num_images,
            answer_next=True,
        )
        ids = torch.tensor(rendered.input_ids)
        ids = ids.repeat_interleave(torch.where(ids == self.image_token_id, self.num_image_tokens, 1))
        if self.max_positions is not None and len(ids) >= self.max_positions:
            raise InputError(
                f"the prompt takes up {len(ids)} positions ({self.num_image_tokens} an image), and the model reads "
                f"{self.max_positions}, answer included; shorten it, or leave out images."
            )
        return ids


def as_list(images: Images) -> list[Image.Image]:
    """One image, several or none, as a list."""
    return [] if images is None else [images] if isinstance(images, Image.Image) else list(images)


def _messages(prompt: Prompt, num_images: int) -> list[Message]:
    messages: list[Message] = [{"from": "human", "value": prompt}] if isinstance(prompt, str) else list(prompt)
    if not messages or messages[-1]["from"] != "human":
        raise InputError("a conversation has to end with the human's turn, which the model then answers.")
    human = [index for index, message in enumerate(messages) if message["from"] == "human"]
    tags = [messages[index]["value"].count(IMAGE_TAG) for index in human]
    # With one image, several tags in one message count as one: they are moved to its front.
    found = sum(map(bool, tags)) if num_images == 1 else sum(tags)
    if num_images and not found:
        first = messages[human[0]]
        messages[human[0]] = {**first, "value": f"{IMAGE_TAG}\n" * num_images + first["value"]}
    elif num_images and found != num_images:
        raise InputError(
            f"the prompt has {found} {IMAGE_TAG} tags for {num_images} images; write one tag per image, or none at "
            "all: then the images stand in front."
        )
    return messages


def load_preparer(folder: str | Path) -> Preparer:
    """Read from a run's folder what preparing needs: not the weights.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it holds another kind of model, or none that can be asked.
    """
    return Preparer(load_config(folder), load_processor(folder))
