"""The processor: layerfuse's pixels, LLaVA's placeholders, kept by saving and loading."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, LlavaProcessor

from integrations.llava.generate import load_answerer
from integrations.llava.processing import LayerfuseImageProcessor, add_image_token
from layerfuse.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from tests.integrations.llava.tiny_parts import make_tokenizer

PREPROCESSING = Preprocessing(size=(32, 32), mean=CLIP_MEAN, std=CLIP_STD, mode="pad")
SIZES = [(50, 30), (30, 50), (32, 32), (203, 1), (1, 90), (90, 3)]


@pytest.mark.parametrize("mode", ["pad", "crop", "squash"])
def test_pixels_are_layerfuses_for_every_mode_and_shape(mode: str) -> None:
    preprocessing = dataclasses.replace(PREPROCESSING, mode=mode)
    processor = LayerfuseImageProcessor(preprocessing.to_dict())
    images = [Image.effect_noise(size, 60).convert("RGB") for size in SIZES]

    expected = torch.stack([preprocessing(image) for image in images])
    assert torch.equal(processor(images)["pixel_values"], expected)
    assert torch.equal(processor([[image] for image in images])["pixel_values"], expected)
    assert torch.equal(processor(np.asarray(images[0]))["pixel_values"], expected[:1])


def test_padding_has_the_mean_colour() -> None:
    pixels = LayerfuseImageProcessor(PREPROCESSING.to_dict())(Image.new("RGB", (64, 32)))["pixel_values"][0]
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)

    colour = torch.tensor([int(channel * 255) for channel in CLIP_MEAN]) / 255
    torch.testing.assert_close(pixels[:, 0, 0], (colour - mean) / std)


def test_the_image_processor_loads_as_it_was_saved(tmp_path: Path) -> None:
    LayerfuseImageProcessor(PREPROCESSING.to_dict()).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)

    assert isinstance(loaded, LayerfuseImageProcessor)
    assert Preprocessing.from_dict(loaded.preprocessing) == PREPROCESSING


def test_an_image_processor_without_preprocessing_is_refused() -> None:
    with pytest.raises(ValueError, match="needs preprocessing"):
        LayerfuseImageProcessor()


def test_the_padding_token_falls_back_on_the_unknown_token() -> None:
    tokenizer = make_tokenizer("llama")
    size = len(tokenizer)

    assert add_image_token(tokenizer) == size
    assert tokenizer.pad_token_id == tokenizer.unk_token_id
    assert add_image_token(tokenizer) == size


def test_the_processor_of_a_run_prepares_what_training_saw(run_folder: Path, data_folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(run_folder)
    assert isinstance(processor, LlavaProcessor)
    answerer = load_answerer(run_folder)
    image = Image.open(data_folder / "0.png")
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What number is it?"}]},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[image], text=text, return_tensors="pt")
    prepared = answerer.prepare(image, "What number is it?")

    assert torch.equal(inputs["input_ids"][0], prepared["input_ids"])
    assert torch.equal(inputs["pixel_values"], prepared["pixel_values"])
