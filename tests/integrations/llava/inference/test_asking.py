"""What a predictor is loaded from and asked: folders that are whole, prompts that fit, threads that share it."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from integrations.llava.checkpoints.model_io import load_processor
from integrations.llava.inference.predictor import Predictor, load_predictor, usable_device
from integrations.llava.prompts import TextEncoder
from layerfuse.errors import UserError
from tests.integrations.llava.inference.answering_parts import PROMPTS

# Folders


@pytest.mark.parametrize(
    ("file", "content", "error", "message"),
    [
        ("tokenizer.json", None, ValueError, "the processor in .*run cannot be read"),
        ("tokenizer.json", b"{", ValueError, "the processor in .*run cannot be read: JSONDecodeError"),
        ("tokenizer_config.json", b"", ValueError, "the processor in .*run cannot be read"),
        ("processor_config.json", None, ValueError, "the processor in .*run cannot be read"),
        ("model.safetensors", None, FileNotFoundError, "holds no weights"),
        ("model.safetensors", b"half", ValueError, "model.safetensors is damaged"),
        ("config.json", b"{", ValueError, "config.json is not valid JSON"),
    ],
)
def test_a_folder_that_lacks_a_file_or_holds_half_of_it_is_told(
    file: str, content: bytes | None, error: type[Exception], message: str, run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)

    with pytest.raises(UserError, match=message) as raised:
        load_predictor(folder)
    assert isinstance(raised.value, error)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("prompt_template", {"nme": "v1"}, "prompt_template is .*nme.*, which is none"),
        ("text_config", {"model_type": "nothing"}, "config.json cannot be read: .*nothing"),
        (
            "text_config",
            {"model_type": "llama", "hidden_size": "many"},
            "config.json cannot be read: .*hidden",
        ),
    ],
)
def test_a_config_that_describes_no_model_is_told(
    key: str, value: Any, message: str, run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(UserError, match=rf"(?s){message}"):
        load_predictor(folder)


def test_a_folder_that_is_not_there_has_no_processor(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_processor(tmp_path / "nowhere")


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_cannot_be_used_is_refused(device: str, run: Path) -> None:
    with pytest.raises(UserError, match=f"device '{device}' cannot be used"):
        load_predictor(run, device=device)


# What can be given


def test_under_torchrun_a_process_takes_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used"):
        usable_device(None)


def test_paths_are_read_as_the_images_they_name(predictor: Predictor, data_folder: Path, pictures: Any) -> None:
    first, second = data_folder / "0.png", str(data_folder / "1.png")
    expected = predictor([pictures[0], pictures[:2]], ["What?", "Sure?"], max_new_tokens=6)

    assert predictor([first, [first, second]], ["What?", "Sure?"], max_new_tokens=6) == expected
    assert "".join(predictor.stream(first, "What?", max_new_tokens=6)) == expected[0]


CHAT = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]


@pytest.mark.parametrize(
    ("images", "prompts", "error", "message"),
    [
        (["nowhere.png"], ["What?"], FileNotFoundError, "image nowhere.png does not exist"),
        ([torch.zeros(3, 8, 8)], ["What?"], TypeError, "an image is a Tensor; give a PIL image"),
        ([[None]], ["What?"], TypeError, "an image is a NoneType; give a PIL image"),
        ("a.png", "What?", TypeError, "images is a str; give a list with one entry per prompt"),
        ([None], "What?", TypeError, "prompts is a str; give a list with one entry per prompt"),
        (Image.new("RGB", (8, 8)), ["What?"], TypeError, "images is a Image; give a list"),
        ([None], [CHAT], ValueError, "Role and content are what chat APIs take: here 'user' is from 'human'"),
        ([None], CHAT, TypeError, "a prompt is a dict; .* Role and content are what chat APIs take"),
        ([None], [["What?"]], ValueError, "a turn is 'What\\?'; write"),
        ([None], [[{"from": "human", "value": None}]], ValueError, "a turn is .*None.*; write"),
        ([None], [None], TypeError, "a prompt is a NoneType; give a text"),
        ([None], ["half \ud83d"], ValueError, "holds half of a character"),
    ],
)
def test_what_is_no_image_and_no_prompt_is_told_with_what_to_give(
    images: Any, prompts: Any, error: type[Exception], message: str, predictor: Predictor
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        predictor(images, prompts)
    assert isinstance(raised.value, error)


def test_an_answer_has_to_fit_behind_its_prompt(predictor: Predictor) -> None:
    length = len(predictor.prepare.encode("What?", [(8, 8)]))

    assert predictor.prepare.room("What?", [(8, 8)]) == 512 - length
    assert len(predictor.prepare.encode("What?", [(8, 8)], max_new_tokens=512 - length)) == length
    for ask in (predictor, lambda images, prompts, **more: list(predictor.stream(images[0], prompts[0], **more))):
        message = (
            rf"{length} positions \(16 of them its images\) .* up to {513 - length}, .* 512; .* most {512 - length} t"
        )
        with pytest.raises(ValueError, match=message):
            ask([Image.new("RGB", (8, 8))], ["What?"], max_new_tokens=513 - length)


def test_an_endless_text_is_refused_before_it_is_tokenised_whole(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest: list[int] = []
    whole = TextEncoder.__call__

    def encode(self: TextEncoder, text: str, **options: Any) -> list[int]:
        longest.append(len(text))
        return whole(self, text, **options)

    monkeypatch.setattr(TextEncoder, "__call__", encode)
    with pytest.raises(ValueError, match="a text of 10,000,000 characters takes up more positions than the 512"):
        predictor([None], ["0123456789" * 1_000_000])
    assert max(longest) == 32 * 512


# Many callers


@pytest.mark.parametrize("compile", [False, True])
def test_threads_that_share_a_predictor_get_the_answers_of_one_caller(
    compile: bool, run: Path, pictures: list[Image.Image]
) -> None:
    predictor = load_predictor(run, compile=compile)

    def ask(number: int) -> list[str]:
        images, prompt = [pictures[number % 8], None], PROMPTS[number % 7]
        if number % 3:
            return predictor(images, [prompt, "What?"], max_new_tokens=6)
        return ["".join(predictor.stream(images[0], prompt, max_new_tokens=6))]

    expected = [ask(number) for number in range(16)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, range(16))) == expected


def test_threads_take_turns_at_the_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = load_predictor(run)
    inside: list[int] = []
    most: list[int] = []
    whole = predictor.model.generate

    def generate(**given: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        answer = whole(**given)
        inside.pop()
        return answer

    monkeypatch.setattr(predictor.model, "generate", generate)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: predictor([None], ["a"], max_new_tokens=1), range(4)))
    assert most == [1, 1, 1, 1]
