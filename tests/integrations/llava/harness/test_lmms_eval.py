"""`layerfuse_llava` inside lmms-eval itself, on tasks of this folder; `make test-lmms` has the environment for it.

The tasks' right answers are those of our own loop: a metric of 1 says that lmms-eval got the same ones.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from integrations.llava.inference.likelihood import answer_likelihoods
from integrations.llava.inference.predictor import Predictor

pytestmark = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed; see make test-lmms")

TASKS = Path(__file__).parent / "lmms_tasks"
QUESTIONS = [
    ("What number is it?", 1),
    ("a", 1),
    ("Where is it?\nOn a wall?", 1),
    ("Sure?", 2),
    ("One two three", 1),
]
CHOICES = ["one", "two", "on a wall", "A"]


@pytest.fixture(scope="module")
def folder(
    predictor: Predictor, run: Path, pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Questions about images with the answers of our own loop, beside the model that gave them."""
    folder = tmp_path_factory.mktemp("lmms")
    (folder / "tiny").symlink_to(run)
    rows = []
    for index, (question, count) in enumerate(QUESTIONS):
        images = pictures[index : index + count]
        names = [f"{index + offset}.png" for offset in range(count)]
        for name, image in zip(names, images, strict=True):
            image.save(folder / name)
        choices = CHOICES[index % 4 :] + CHOICES[: index % 4]
        found = answer_likelihoods(predictor, [images] * 4, [question] * 4, choices)
        rows.append(
            {
                "images": names,
                "question": question,
                "choices": choices,
                "likeliest": max(range(4), key=lambda choice: found[choice].log_probability),
                "answer": predictor([images], [question], max_new_tokens=12)[0],
                "answer_behind": predictor([images], [question + "\n<image>" * count], max_new_tokens=12)[0],
            }
        )
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def lmms_eval(folder: Path, tmp_path: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> tuple[int, str]:
    root = Path(__file__).parents[4]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    surroundings = {**os.environ, **offline, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    told = ["--model", "layerfuse_llava", "--model_args", "pretrained=tiny,device=cpu", "--include_path", str(TASKS)]
    kept = ["--log_samples", "--output_path", str(tmp_path / "out")]
    command = [sys.executable, *launcher, "-m", "lmms_eval", *told, *kept, *arguments]
    result = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, timeout=600)
    return result.returncode, result.stdout + result.stderr


def metrics(tmp_path: Path, output: str) -> dict[str, dict[str, Any]]:
    files = sorted((tmp_path / "out").rglob("*results.json"))
    assert files, output
    found: dict[str, dict[str, Any]] = json.loads(files[0].read_text())["results"]
    return found


def samples(tmp_path: Path, task: str) -> list[dict[str, Any]]:
    (file,) = (tmp_path / "out").rglob(f"*samples_{task}.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("batch_size", ["1", "3"])
def test_tasks_of_text_and_of_messages_get_the_answers_of_our_own_loop(
    folder: Path, tmp_path: Path, batch_size: str
) -> None:
    names = "layerfuse_image_question,layerfuse_image_messages"
    _, output = lmms_eval(folder, tmp_path, "--tasks", names, "--batch_size", batch_size)
    found = metrics(tmp_path, output)
    assert {name: own["right,none"] for name, own in found.items()} == dict.fromkeys(names.split(","), 1.0)
    assert len(samples(tmp_path, "layerfuse_image_question")) == len(QUESTIONS)


def test_the_simple_class_chooses_the_likeliest_option(folder: Path, tmp_path: Path) -> None:
    names = "layerfuse_image_choice,layerfuse_image_question"
    _, output = lmms_eval(folder, tmp_path, "--tasks", names, "--batch_size", "4", "--force_simple")
    found = metrics(tmp_path, output)
    assert found["layerfuse_image_choice"]["acc,none"] == 1
    assert found["layerfuse_image_question"]["right,none"] == 1
    rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    assert len({row["likeliest"] for row in rows}) > 1


def test_two_processes_share_the_questions(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port)
    task = "layerfuse_image_question"
    _, output = lmms_eval(folder, tmp_path, "--tasks", task, "--batch_size", "2", launcher=launcher)
    assert metrics(tmp_path, output)[task]["right,none"] == 1
    assert sorted(row["doc_id"] for row in samples(tmp_path, task)) == [0, 1, 2, 3, 4]


def test_rounds_and_unknown_arguments_are_refused_clearly(folder: Path, tmp_path: Path) -> None:
    _, output = lmms_eval(folder, tmp_path, "--tasks", "layerfuse_image_rounds", "--batch_size", "1")
    assert "layerfuse_image_rounds: asked in several rounds" in output
    models = importlib.import_module("integrations.llava.harness.lmms_eval_models")
    with pytest.raises(ValueError, match="argument of layerfuse_llava 'conv_template' is unknown"):
        models.LmmsEvalChat.create_from_arg_string("pretrained=tiny,conv_template=v1", {"batch_size": 1})


def test_the_registry_has_both_classes_and_all_other_models() -> None:
    registry = importlib.import_module("lmms_eval.models")
    models = importlib.import_module("integrations.llava.harness.lmms_eval_models")
    assert registry.get_model("layerfuse_llava") is models.LmmsEvalChat
    assert registry.get_model("layerfuse_llava", force_simple=True) is models.LmmsEvalSimple
    assert {"llava_hf", "qwen2_5_vl"} <= set(registry.list_available_models())


def asked(task: str, number: int, *arguments: Any) -> Any:
    return SimpleNamespace(args=(*arguments, number, task, "test"), task_name=task)


def test_requests_keep_their_order_and_stay_as_they_are_and_cleaning_does_no_harm(
    run: Path, predictor: Predictor, pictures: list[Image.Image], tmp_path: Path
) -> None:
    models = importlib.import_module("integrations.llava.harness.lmms_eval_models")
    path = tmp_path / "a.png"
    pictures[0].save(path)
    model = models.LmmsEvalSimple.create_from_arg_string(f"pretrained={run}", {"batch_size": 2, "device": "cpu"})
    assert (model.rank, model.world_size, model.batch_size, model.device.type) == (0, 1, 2, "cpu")
    documents = [[pictures[1]], [path], [pictures[2], path], None, pictures[3]]
    model.task_dict = {"mine": {"test": documents}}
    words = ["What number is it, and where, on a wall?", "a", "Sure?", "One?", "Where?"]
    settings = {"until": ["\n\n"], "max_new_tokens": 12}

    def find(document: Any) -> Any:
        return document

    requests = [asked("mine", number, words[number], settings, find) for number in range(5)]
    expected = predictor([pictures[1], path, [pictures[2], path], None, pictures[3]], words, max_new_tokens=12)
    for _ in range(2):
        assert model.generate_until(requests) == expected
        assert settings == {"until": ["\n\n"], "max_new_tokens": 12}
        model.clean()

    options = answer_likelihoods(predictor, [pictures[1]] * 2, ["a"] * 2, ["one", "on a wall"])
    measured = model.loglikelihood([asked("mine", 0, "a", f" {own}", find) for own in ("one", "on a wall")])
    sign = -1 if models.prefers_small_numbers() else 1
    assert [sign * number for number, _ in measured] == pytest.approx(
        [own.log_probability for own in options], abs=1e-3
    )
    ((number, greedy),) = model.loglikelihood([asked("mine", 0, "a", lambda document: "one", find)])
    assert number == pytest.approx(options[0].log_probability, abs=1e-3)
    assert greedy == options[0].is_greedy
    with pytest.raises(ValueError, match="options without their question"):
        model.loglikelihood([SimpleNamespace(args=("", "one"), task_name="mine")])
