"""`python -m integrations.llava generate` with questions as arguments."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from integrations.llava.cli.generate import main
from integrations.llava.inference.predictor import Predictor


def ask(run: Path, *arguments: object, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert main(["--model", str(run), "--max-new-tokens", "8", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_an_image_each_or_several_images_for_one_question(
    run: Path, predictor: Predictor, data_folder: Path, pictures: list[Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = data_folder / "0.png", data_folder / "1.png"

    each = ask(run, "--image", first, "--image", second, "--prompt", "What?", capsys=capsys)
    assert each == predictor(pictures[:2], ["What?"] * 2, max_new_tokens=8)

    together = ask(run, "--image", first, second, "--prompt", "What?", capsys=capsys)
    assert together == predictor([pictures[:2]], ["What?"], max_new_tokens=8)

    pairs = ["--image", first, second, "--image", second, "--prompt", "<image> or <image>?", "--prompt", "Sure?"]
    assert ask(run, *pairs, capsys=capsys) == predictor(
        [pictures[:2], pictures[1]], ["<image> or <image>?", "Sure?"], max_new_tokens=8
    )


def test_one_image_for_several_questions_or_none(
    run: Path, predictor: Predictor, data_folder: Path, pictures: list[Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["--prompt", "What?", "--prompt", "Sure?"]

    assert ask(run, "--image", data_folder / "0.png", *prompts, capsys=capsys) == predictor(
        [pictures[0]] * 2, ["What?", "Sure?"], max_new_tokens=8
    )
    assert ask(run, *prompts, capsys=capsys) == predictor([None, None], ["What?", "Sure?"], max_new_tokens=8)


def test_decoding_and_loading_are_options(run: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = ["--image", data_folder / "0.png", "--prompt", "What?"]
    sampled = [*question, "--temperature", 2, "--top-p", 0.9, "--seed"]
    greedy = ask(run, *question, capsys=capsys)

    assert ask(run, *sampled, 1, capsys=capsys) == ask(run, *sampled, 1, capsys=capsys)
    assert ask(run, *sampled, 1, capsys=capsys) != ask(run, *sampled, 2, capsys=capsys)
    assert ask(run, *question, "--num-beams", 3, capsys=capsys) != greedy
    assert ask(run, *question, "--compile", capsys=capsys) == greedy
    assert ask(run, *question, "--stop", "§", "--stop", greedy[0][4:6], capsys=capsys) == [greedy[0][:4].strip()]
    assert ask(run, *question, "--dtype", "bf16", "--device", "cpu", capsys=capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --prompt TEXT or --input FILE"),
        (["--prompt", "a", "--input", "q.jsonl"], "give either --prompt TEXT or --input FILE"),
        (["--input", "q.jsonl"], "--input and --output belong together"),
        (["--prompt", "a", "--output", "a.jsonl"], "--input and --output belong together"),
        (["--input", "q", "--output", "a", "--image", "b"], "--image belongs to --prompt"),
        (["--prompt", "a", "--batch-size", "0"], "--batch-size 0 is too small"),
        (["--prompt", "a", "--top-p", "0.5"], "top_p=0.5 needs sampling"),
        (["--image", "nowhere.png", "--prompt", "a"], "image nowhere.png does not exist"),
        (["--image", __file__, "--prompt", "a"], "cannot be read"),
        (["--prompt", "a"], "holds no config.json"),
        (["--prompt", "a", "--device", "gpu"], "holds no config.json"),
        (["--input", "nowhere.jsonl", "--output", "a"], "nowhere.jsonl does not exist"),
        (
            ["--prompt", "a", "--prompt", "b", "--image", "x", "--image", "y", "--image", "z"],
            "got 3 times --image and 2 prompts",
        ),
    ],
)
def test_the_command_explains_what_is_wrong(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(tmp_path), *arguments])
    assert message in capsys.readouterr().err


def test_a_prompt_that_does_not_fit_is_refused_before_the_weights_are_read(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "integrations.llava.inference.predictor.load_model", lambda *_, **__: pytest.fail("weights were read")
    )

    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(run), "--prompt", "word " * 900])
    assert "the model reads 512" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(run), "--prompt", "a", "--max-new-tokens", "500"])
    assert "its answer up to 500, and the model reads 512" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # Bytes of the command line that are no UTF-8 come as halves of characters.
        (["--prompt", "caf\udce9"], "holds half of a character"),
        (["--prompt", "a" * 10_000_000], "a text of 10,000,000 characters takes up more positions than the 512"),
        (["--prompt", "a", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    ],
)
def test_what_a_model_cannot_be_asked_is_told_before_the_weights_are_read(
    arguments: list[str],
    message: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "integrations.llava.inference.predictor.load_model", lambda *_, **__: pytest.fail("weights were read")
    )

    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(run), *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-workers", "-1"], "num_workers=-1 is negative"),
        (["--output", "{folder}"], "is a folder; give the name of a file of answers"),
        (["--output", "{folder}/q.jsonl/a.jsonl"], "a.jsonl cannot be written (File exists). Nothing was asked yet"),
    ],
)
def test_a_file_of_questions_that_cannot_be_answered_is_told(
    options: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.jsonl").write_text('{"id": 1, "prompt": "a"}\n')
    command = ["--model", run, "--input", tmp_path / "q.jsonl", "--output", tmp_path / "a.jsonl"]

    with pytest.raises(SystemExit, match="2"):
        main([*map(str, command), *(option.format(folder=tmp_path) for option in options)])
    assert message in capsys.readouterr().err


def test_answers_are_printed_whatever_the_terminal_can_show(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(Predictor, "__call__", lambda *_, **__: ["caf\xe9", "\u2028"])
    assert main(["--model", str(run), "--prompt", "a", "--prompt", "b"]) == 0
    sys.stdout.flush()

    assert written.getvalue() == b"caf\\xe9\n\\u2028\n"


@pytest.mark.parametrize("error", [ValueError, RuntimeError, FileNotFoundError, ImportError])
def test_a_real_error_keeps_its_traceback(error: type[Exception], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("of the program")

    monkeypatch.setattr("integrations.llava.inference.predictor.load_model", fail)
    with pytest.raises(error, match="of the program"):
        main(["--model", str(run), "--prompt", "a"])
