"""Answers: the same at every batch size, through every door."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, LlavaProcessor, pipeline

from integrations.llava.generate import Answerer, load_answerer, main

PROMPTS = [
    "What number?",
    "What number is it, and where?",
    "Sure?",
    "",
    "</s>",
    "One two three four five six?",
    "a",
    "b",
]


@pytest.fixture(scope="module")
def answerer(run_folder: Path) -> Answerer:
    return load_answerer(run_folder)


@pytest.fixture(scope="module")
def images(data_folder: Path) -> list[Image.Image]:
    return [Image.open(data_folder / f"{index}.png").convert("RGB") for index in range(8)]


def test_answers_do_not_depend_on_the_batch_size(answerer: Answerer, images: list[Image.Image]) -> None:
    one, eight = (answerer(images, PROMPTS, max_new_tokens=12, batch_size=size) for size in (1, 8))

    assert one == eight
    assert any(one)


def test_batches_may_mix_images_and_text(answerer: Answerer, images: list[Image.Image]) -> None:
    entries = [None, images[0], [images[1], images[2]], None]
    prompts = ["Hello?", "What?", "<image> or <image>?", "One?"]
    one, four = (answerer(entries, prompts, max_new_tokens=8, batch_size=size) for size in (1, 4))

    assert one == four


def test_images_without_tags_stand_in_front(answerer: Answerer, images: list[Image.Image]) -> None:
    with_tags = answerer.prepare(images[:2], "<image>\n<image>\nWhat?")
    without = answerer.prepare(images[:2], "What?")

    assert torch.equal(with_tags["input_ids"], without["input_ids"])


def test_pipeline_and_auto_class_give_the_same_answer(
    answerer: Answerer, run_folder: Path, images: list[Image.Image]
) -> None:
    expected = answerer(images[:1], PROMPTS[:1], max_new_tokens=8)[0]
    chat = [{"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": PROMPTS[0]}]}]
    answers = pipeline("image-text-to-text", model=str(run_folder))(
        text=chat, return_full_text=False, generate_kwargs={"max_new_tokens": 8, "do_sample": False}
    )
    assert answers[0]["generated_text"].strip() == expected

    model = AutoModelForImageTextToText.from_pretrained(run_folder)
    assert Answerer(model, answerer.processor)(images[:1], PROMPTS[:1], max_new_tokens=8) == [expected]


def test_numbers_of_images_and_prompts_have_to_agree(answerer: Answerer) -> None:
    with pytest.raises(ValueError, match="got 2 images for 1 prompts"):
        answerer([None, None], ["a"])


def test_an_empty_batch_size_is_refused(answerer: Answerer) -> None:
    with pytest.raises(ValueError, match="batch_size=0 is too small"):
        answerer([None], ["a"], batch_size=0)


def test_a_checkpoint_without_template_is_refused(answerer: Answerer, run_folder: Path) -> None:
    model = load_answerer(run_folder).model
    model.config.prompt_template = None

    with pytest.raises(ValueError, match="no prompt_template"):
        Answerer(model, answerer.processor)


def test_a_processor_of_another_kind_is_refused(answerer: Answerer) -> None:
    @dataclasses.dataclass
    class Other:
        image_processor: object = None

    with pytest.raises(ValueError, match="expected LayerfuseImageProcessor"):
        Answerer(answerer.model, Other())  # type: ignore[arg-type]
    assert isinstance(answerer.processor, LlavaProcessor)


def test_the_command_prints_one_answer_a_line(
    run_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(run_folder), "--max-new-tokens", "2", "--prompt", "What?"]
    arguments += ["--image", str(data_folder / "0.png"), "--image", str(data_folder / "1.png")]

    assert main(arguments) == 0
    assert capsys.readouterr().out.count("\n") >= 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "nowhere.png", "--prompt", "a"], "image nowhere.png does not exist"),
        (["--image", __file__, "--prompt", "a"], "cannot be read"),
        (["--prompt", "a", "--prompt", "b", "--image", "x", "--image", "y", "--image", "z"], "3 images and 2 prompts"),
        (["--prompt", "a"], "holds no config.json"),
    ],
)
def test_the_command_explains_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err
