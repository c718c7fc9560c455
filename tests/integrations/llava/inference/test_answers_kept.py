"""Answers outlive what ends a run: kills, full disks, places that cannot be written, other questions."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from integrations.llava.cli.generate import main
from integrations.llava.inference.batching import Shard
from integrations.llava.inference.prompt_builder import load_preparer
from integrations.llava.inference.requests import Request, question_fingerprints, refuse_broken_images
from integrations.llava.inference.results import AnswerFile, answer_settings
from integrations.llava.inference.sampling import SamplingParams

posix = pytest.mark.skipif(os.name == "nt", reason="needs fork and resource limits")


def answer_file(path: Path, count: int, **options: Any) -> AnswerFile:
    """Answers to `count` questions "q", with ids from 0."""
    settings: dict[str, Any] = {"model_id": "m", "metadata": {}, "shard": Shard()} | options
    requests = [Request(index, (), "q") for index in range(count)]
    return AnswerFile(path, requests, fingerprints=dict.fromkeys(range(count), "f"), **settings)


def answer_of(index: int) -> str:
    return f"answer {index} \u2028 é" * (1 + index % 50)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def in_child(work: Callable[[], None]) -> Any:
    """Fork a process that does something; a fork starts at once."""
    process = get_context("fork").Process(target=work)
    process.start()
    return process


# Kills


@posix
def test_two_writers_killed_at_any_moment_leave_whole_rows_and_no_answer_twice(tmp_path: Path) -> None:
    path, count = tmp_path / "a.jsonl", 1000
    dice = random.Random(0)

    def write(size: int) -> None:
        output = answer_file(path, count)
        waiting = [index for index in range(count) if index not in output]
        for start in range(0, len(waiting), size):
            output.write({index: answer_of(index) for index in waiting[start : start + size]})
            time.sleep(0.001 if size == 1 else 0)  # on any disk, no writer is done before it is killed
        output.merge()

    kills = 0
    known: set[int] = set()
    while not path.exists():
        # Small batches until enough were killed, then the rest at once.
        writers = [in_child(partial(write, 1 if kills < 12 else 100)) for _ in range(2)]
        if kills < 12:
            time.sleep(dice.uniform(0.01, 0.06))
            for writer in writers:
                os.kill(writer.pid, signal.SIGKILL)
                kills += 1
        for writer in writers:
            writer.join()
        answers = answer_file(path, count).answers
        # What was there once stays, as it was written.
        assert known <= answers.keys()
        assert all(text == answer_of(int(index)) for index, text in answers.items())
        known = {int(index) for index in answers}

    assert kills >= 12
    assert [(row["id"], row["answer"]) for row in rows_of(path)] == [(i, answer_of(i)) for i in range(count)]
    assert answer_file(path, count).merge() == 0
    assert [name.name for name in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_process_that_merges_takes_nothing_from_one_that_still_writes(tmp_path: Path) -> None:
    first, second = (answer_file(tmp_path / "a.jsonl", 2) for _ in range(2))
    second.write({0: "a"})
    first.write({0: "a", 1: "b"})
    assert first.merge() == 0
    second.write({1: "b"})

    assert second.merge() == 0
    assert [row["answer"] for row in rows_of(tmp_path / "a.jsonl")] == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# Places


@pytest.mark.parametrize("place", ["folder", "file/below/a.jsonl", "full/a.jsonl"])
def test_an_output_that_cannot_be_written_is_refused_at_the_start(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    if place.startswith("full"):
        monkeypatch.setattr("os.fsync", no_room)

    with pytest.raises(
        OSError, match=f"{place} (is a folder; give the name|cannot be written .* Nothing was asked yet)"
    ):
        answer_file(tmp_path / place, 1)
    assert not list(tmp_path.rglob("*.part-*"))


def no_room(_: int) -> None:
    raise OSError(28, "No space left on device")


@posix
def test_a_disk_that_is_full_loses_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    told = tmp_path / "told"

    def write() -> None:
        output = answer_file(tmp_path / "out" / "a.jsonl", 3)
        output.write({0: "first"})
        # As a full disk: a part of the row is written, then no more; nor is there room elsewhere.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        (part,) = (tmp_path / "out").iterdir()
        resource.setrlimit(resource.RLIMIT_FSIZE, (part.stat().st_size + 40, resource.RLIM_INFINITY))
        try:
            output.write({1: "x" * 500})
        except OSError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            told.write_text(str(error))

    child = in_child(write)
    child.join()
    assert "answers cannot be written to" in told.read_text()
    assert "Those of this batch are lost; make room" in told.read_text()
    assert answer_file(tmp_path / "out" / "a.jsonl", 3).answers == {0: "first"}
    (part,) = (tmp_path / "out").iterdir()
    assert part.read_bytes().endswith(b"}\n")
    assert not list(spare.iterdir())


def test_rows_without_room_are_kept_with_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spare = tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    output = answer_file(tmp_path / "out" / "a.jsonl", 2)
    output.write({0: "first"})
    calls: list[int] = []

    def full_once(_: int) -> None:
        calls.append(1)
        if len(calls) == 1:
            no_room(0)

    with monkeypatch.context() as full:
        full.setattr("os.fsync", full_once)
        with pytest.raises(
            OSError, match=r"No space left.*Earlier answers are in .*part-.*make room, move it to .*out"
        ):
            output.write({1: "second"})
    assert answer_file(tmp_path / "out" / "a.jsonl", 2).answers == {0: "first"}
    (kept,) = spare.iterdir()
    earlier = next((tmp_path / "out").iterdir())
    kept.rename(tmp_path / "out" / f"{earlier.name}-more")

    assert answer_file(tmp_path / "out" / "a.jsonl", 2).answers == {0: "first", 1: "second"}


def test_a_merge_without_room_keeps_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = answer_file(tmp_path / "a.jsonl", 1)
    output.write({0: "first"})
    with monkeypatch.context() as full:
        full.setattr("os.fsync", no_room)
        with pytest.raises(OSError, match="Every answer is in the parts beside it; make room"):
            output.merge()

    assert answer_file(tmp_path / "a.jsonl", 1).merge() == 0
    assert [row["answer"] for row in rows_of(tmp_path / "a.jsonl")] == ["first"]


# Other models and questions


def test_overwriting_removes_nothing_before_there_is_an_answer(tmp_path: Path) -> None:
    old = answer_file(tmp_path / "a.jsonl", 1, metadata={"seed": 0})
    old.write({0: "old"})
    old.merge()
    anew = answer_file(tmp_path / "a.jsonl", 1, metadata={"seed": 1}, overwrite=True)

    assert 0 not in anew
    assert rows_of(tmp_path / "a.jsonl")[0]["answer"] == "old"
    anew.write({0: "new"})
    assert anew.merge() == 0
    assert rows_of(tmp_path / "a.jsonl")[0]["answer"] == "new"


@pytest.mark.parametrize("content", ["a note\n", '{"id": 0, "prompt": "q"}\n'])
def test_overwriting_removes_answers_only(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(
        ValueError, match=r"a\.jsonl holds (no answers|something else than answers).* remove it yourself"
    ):
        answer_file(tmp_path / "a.jsonl", 1, overwrite=True)
    assert (tmp_path / "a.jsonl").read_text() == content


@pytest.mark.parametrize("change", ["name", "pixels", "turns"])
def test_the_same_words_about_something_else_are_another_question(change: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    turns: list[Any] = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Yes?"}]
    turns.append({"from": "human", "value": "What?"})

    def opened(image: str, prompt: Sequence[Any]) -> AnswerFile:
        requests = [Request(0, (image,), prompt)]
        fingerprints = question_fingerprints(requests, tmp_path)
        return AnswerFile(
            tmp_path / "a.jsonl", requests, fingerprints=fingerprints, model_id="m", metadata={}, shard=Shard()
        )

    opened("a.png", turns).write({0: "a"})
    assert opened("a.png", turns).answers == {0: "a"}
    if change == "pixels":
        Image.effect_noise((64, 64), 90).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="answers the same words with id 0 about other images, or behind other turns"):
        opened("b.png" if change == "name" else "a.png", turns[2:] if change == "turns" else turns)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("processor_config.json", "mode", "squash"),
        ("tokenizer.json", "version", None),
        ("config.json", "system", "Be brief."),
    ],
)
def test_a_checkpoint_that_reads_otherwise_is_another_model(
    file: str, key: str, value: Any, run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    content = json.loads((folder / file).read_text())
    if key == "mode":
        preprocessing = content["image_processor"]["preprocessing"]
        assert preprocessing["mode"] != value
        preprocessing["mode"] = value
    elif key == "system":
        content["prompt_template"]["system"] = value
    else:
        content["added_tokens"][-1]["lstrip"] = not content["added_tokens"][-1]["lstrip"]
    (folder / file).write_text(json.dumps(content))

    assert settings(folder) != settings(run)
    assert settings(shutil.copytree(run, tmp_path / "copy")) == settings(run)


def settings(folder: Path) -> dict[str, Any]:
    import torch

    preparer = load_preparer(folder)
    return answer_settings(folder, preparer, dtype=torch.float32, quantize="none", sampling=SamplingParams())


def test_weights_that_differ_in_one_row_of_an_embedding_are_another_model(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(run, tmp_path / "run")
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.embed_tokens.weight"][300] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    assert settings(folder)["weights"] != settings(run)["weights"]


# Names


def test_links_are_no_image_names(tmp_path: Path) -> None:
    requests = [Request(0, ("https://example.org/a.png", "data:image/png;base64,iVBORw0KGgo="), "a")]
    with pytest.raises(ValueError, match=r"2 problems.*\n.*a\.png: is a URL; give a file\n.*the picture itself"):
        refuse_broken_images(requests, tmp_path)


@pytest.mark.parametrize("name", ["../out.png", "/out.png", "below/../../out.png"])
def test_image_names_do_not_leave_the_folder(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "out.png")
    named = str(tmp_path / "out.png") if name == "/out.png" else name
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": 1, "prompt": "a", "image": named}))
    command = ["--model", str(run), "--input", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "a.jsonl")]

    with pytest.raises(SystemExit, match="2"):
        main([*command, "--image-folder", str(tmp_path / "images")])
    assert "outside the image folder" in capsys.readouterr().err
