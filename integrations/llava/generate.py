"""Answer questions about images with a trained model, one at a time or in batches, always with the same answers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import LlavaProcessor

from layerfuse.preprocessing import Preprocessing

from .checkpoint import load_model, load_processor
from .data import Collator
from .model import FusedLlavaForConditionalGeneration
from .processing import LayerfuseImageProcessor
from .prompts import IMAGE_TAG, Template, TextEncoder, render

__all__ = ["Answerer", "load_answerer", "main"]

Images = Image.Image | Sequence[Image.Image] | None


class Answerer:
    """A model that takes images and prompts and gives answers.

    Prompts are written with the template stored in the checkpoint, exactly as in training.

    Args:
        model: with its prompt template in its config.
        processor: the one saved beside it.

    Raises:
        ValueError: if the checkpoint holds no prompt template, or a processor of another kind.
    """

    def __init__(self, model: FusedLlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
        if model.config.prompt_template is None:
            raise ValueError("the model's config has no prompt_template; save one with it, see Template.to_dict().")
        if not isinstance(processor.image_processor, LayerfuseImageProcessor):
            raise ValueError(
                f"the processor prepares images with {type(processor.image_processor).__name__}; expected "
                "LayerfuseImageProcessor, as build_processor makes it."
            )
        self.model = model.eval()
        self.processor = processor
        self.template = Template(**model.config.prompt_template)
        self.encoder = TextEncoder(processor.tokenizer)
        self.preprocessing = Preprocessing.from_dict(processor.image_processor.preprocessing)
        self._collate = Collator(processor.tokenizer.pad_token_id, side="left")

    @torch.inference_mode()
    def __call__(
        self,
        images: Sequence[Images],
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        batch_size: int = 8,
    ) -> list[str]:
        """Answer greedily.

        Args:
            images: per prompt an image, several, or None. Images stand in front of the prompt, unless the prompt has
                as many `<image>` tags as there are images.
            prompts: the questions.
            max_new_tokens: an answer's longest length.
            batch_size: prompts at a time; it changes the speed, not the answers.

        Returns:
            The answers, without control tokens and surrounding blanks.

        Raises:
            ValueError: if numbers of images and prompts differ, or the batch size is below 1.
        """
        if len(images) != len(prompts):
            raise ValueError(
                f"got {len(images)} images for {len(prompts)} prompts; give one entry of images per prompt."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is too small; answer at least 1 prompt at a time.")
        samples = [self.prepare(entry, prompt) for entry, prompt in zip(images, prompts, strict=True)]
        answers: list[str] = []
        for start in range(0, len(samples), batch_size):
            batch = self._collate(samples[start : start + batch_size])
            batch = {name: tensor.to(self.model.device) for name, tensor in batch.items()}
            ids = self.model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=self.encoder.end,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
            new = ids[:, batch["input_ids"].shape[1] :]
            answers += self.processor.batch_decode(new, skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def prepare(self, images: Images, prompt: str) -> dict[str, torch.Tensor]:
        """Write a prompt out and prepare its images.

        Returns:
            `input_ids` (T,) with images expanded, `pixel_values` (images, 3, height, width).
        """
        pictures = [] if images is None else [images] if isinstance(images, Image.Image) else list(images)
        if pictures and (len(pictures) == 1 or prompt.count(IMAGE_TAG) != len(pictures)):
            prompt = f"{IMAGE_TAG}\n" * len(pictures) + prompt
        rendered = render(
            [{"from": "human", "value": prompt}],
            template=self.template,
            encoder=self.encoder,
            image_token_id=self.model.config.image_token_index,
            num_images=len(pictures),
            answer_next=True,
        )
        ids = torch.tensor(rendered.input_ids)
        is_image = ids == self.model.config.image_token_index
        ids = ids.repeat_interleave(torch.where(is_image, self.model.config.image_seq_length, 1))
        height, width = self.preprocessing.size
        pixels = self.preprocessing.batch(pictures) if pictures else torch.empty(0, 3, height, width)
        return {"input_ids": ids, "pixel_values": pixels}


def load_answerer(
    folder: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Answerer:
    """Load a run's folder for answering.

    Args:
        folder: as `train` wrote it.
        device: where to compute; CUDA if there is one, else the CPU.
        dtype: to compute in.

    Returns:
        The answerer.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if its weights do not cover the model.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Answerer(load_model(folder, device=device, dtype=dtype), load_processor(folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Answer from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m integrations.llava generate", description="Answer questions about images."
    )
    parser.add_argument("--model", required=True, help="folder of a finished run")
    parser.add_argument("--image", action="append", default=[], help="image file; repeat for several")
    parser.add_argument("--prompt", action="append", required=True, help="question; one for all images, or one each")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args(argv)
    count = max(len(arguments.image), len(arguments.prompt))
    if len(arguments.prompt) not in (1, count) or len(arguments.image) not in (0, 1, count):
        parser.error(
            f"got {len(arguments.image)} images and {len(arguments.prompt)} prompts; give one for all, or as many"
        )
    try:
        images: list[Images] = [_open(path) for path in arguments.image]
        answerer = load_answerer(arguments.model)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    images = images if len(images) == count else (images or [None]) * count
    prompts = arguments.prompt if len(arguments.prompt) == count else arguments.prompt * count
    answers = answerer(images, prompts, max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size)
    for answer in answers:
        print(answer)
    return 0


def _open(path: str) -> Image.Image:
    if not Path(path).is_file():
        raise FileNotFoundError(f"image {path} does not exist; give the path of a picture.")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read ({error}); give a whole picture.") from error
