"""`transformers.pipeline("image-text-to-text")` on a run's folder: the same answers as ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import ImageTextToTextPipeline, pipeline

from integrations.llava.inference.predictor import Predictor
from tests.integrations.llava.tiny_parts import human_and_gpt

OPTIONS: dict[str, Any] = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 8, "do_sample": False}}


@pytest.fixture(scope="module")
def pipe(run: Path) -> ImageTextToTextPipeline:
    return pipeline("image-text-to-text", model=str(run))


def user(text: str, *images: Image.Image) -> dict[str, Any]:
    """A message with images in front."""
    shown = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_a_question_with_any_number_of_images(
    pipe: ImageTextToTextPipeline, predictor: Predictor, pictures: list[Image.Image], num_images: int
) -> None:
    images = pictures[:num_images]
    answers = pipe(text=[user("What number?", *images)], **OPTIONS)

    assert answers[0]["generated_text"].strip() == predictor([images], ["What number?"], max_new_tokens=8)[0]


def test_an_image_file(
    pipe: ImageTextToTextPipeline, predictor: Predictor, pictures: list[Image.Image], tmp_path: Path
) -> None:
    pictures[3].save(tmp_path / "a.png")
    parts = [{"type": "image", "path": str(tmp_path / "a.png")}, {"type": "text", "text": "What?"}]
    answers = pipe(text=[{"role": "user", "content": parts}], **OPTIONS)

    assert answers[0]["generated_text"].strip() == predictor([pictures[3]], ["What?"], max_new_tokens=8)[0]


def test_a_conversation(pipe: ImageTextToTextPipeline, predictor: Predictor, pictures: list[Image.Image]) -> None:
    turns = [user("What number?", pictures[0])]
    turns += [{"role": "assistant", "content": [{"type": "text", "text": "It is one."}]}, user("Sure?")]
    expected = predictor([pictures[0]], [human_and_gpt("What number?", "It is one.", "Sure?")], max_new_tokens=8)

    assert pipe(text=turns, **OPTIONS)[0]["generated_text"].strip() == expected[0]
    last = pipe(text=turns, generate_kwargs=OPTIONS["generate_kwargs"])[0]["generated_text"][-1]
    assert last["content"].strip() == expected[0]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_pad_on_the_left(
    pipe: ImageTextToTextPipeline, predictor: Predictor, pictures: list[Image.Image], batch_size: int
) -> None:
    prompts = ["What number is it, on what wall, in a chat between a user and an assistant?", "a", "Sure?"]
    chats = [[user(prompt, image)] for prompt, image in zip(prompts, pictures, strict=False)]
    answers = pipe(text=chats, batch_size=batch_size, **OPTIONS)

    assert pipe.tokenizer.padding_side == "left"
    assert [answer[0]["generated_text"].strip() for answer in answers] == predictor(
        pictures[:3], prompts, max_new_tokens=8
    )
