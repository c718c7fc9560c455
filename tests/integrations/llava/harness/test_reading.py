"""What harnesses say: arguments, settings of decoding, messages; read strictly, and left as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from integrations.llava.harness.arguments import HarnessArguments, cut_answer, read_arguments, read_decoding
from integrations.llava.harness.messages import read_messages
from integrations.llava.inference.sampling import SamplingParams


def test_arguments_are_read_as_the_command_line_gives_them() -> None:
    given = {"pretrained": "runs/a", "dtype": "bfloat16", "device": "cpu", "batch_size": "4", "max_batch_size": 64}
    assert read_arguments(given) == HarnessArguments("runs/a", torch.bfloat16, "cpu", 4)
    assert read_arguments({"pretrained": 7}) == HarnessArguments("7")
    assert read_arguments({"pretrained": "a", "dtype": "auto"}).dtype is None


def test_a_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert read_arguments({"pretrained": "a", "device": "cuda"}).device == "cuda:3"
    assert read_arguments({"pretrained": "a", "device": "cuda:1"}).device == "cuda:1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "needs a checkpoint; give --model_args pretrained=FOLDER"),
        ({"pretrained": "a", "dtyp": "auto"}, "argument of layerfuse_llava 'dtyp' is unknown; did you mean 'dtype'"),
        ({"pretrained": "a", "conv_template": "v1"}, "Known: batch_size, compile, device, dtype, max_new_tokens"),
        ({"pretrained": "a", "dtype": "float8"}, "dtype is 'float8'; give one of auto, float32"),
        ({"pretrained": "a", "quantize": "int4"}, "quantize is 'int4'; give one of none, int8, nf4"),
        ({"pretrained": "a", "batch_size": "auto"}, "batch_size is 'auto'; give a whole number from 1 on"),
        ({"pretrained": "a", "batch_size": 0}, "batch_size is 0"),
        ({"pretrained": "a", "max_new_tokens": True}, "max_new_tokens is True"),
        ({"pretrained": "a", "compile": "yes"}, "compile is 'yes'; give True or False"),
    ],
)
def test_what_is_not_taken_is_refused_with_what_is(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_arguments(given)


@pytest.mark.parametrize(
    ("given", "sampling", "ends"),
    [
        ({}, SamplingParams(99), ()),
        ({"until": ["\n\n"], "max_new_tokens": 16, "temperature": 0, "do_sample": False}, SamplingParams(16), ()),
        ({"until": "ASSISTANT:", "image_aspect_ratio": "original"}, SamplingParams(99), ("ASSISTANT:",)),
        ({"until": ["</s>", "", "\n\n"], "top_p": None, "num_beams": 1}, SamplingParams(99), ("</s>", "\n\n")),
        ({"temperature": 0.7, "top_p": 0.9, "seed": 5}, SamplingParams(99, 0.7, 0.9, seed=5), ()),
        ({"temperature": 0.7, "do_sample": False, "top_p": 0.9}, SamplingParams(99), ()),
        ({"max_gen_toks": 5, "num_beams": 3, "repetition_penalty": 1.0}, SamplingParams(5, num_beams=3), ()),
    ],
)
def test_decoding_is_greedy_unless_a_task_samples(
    given: dict[str, Any], sampling: SamplingParams, ends: tuple[str, ...]
) -> None:
    before = dict(given)
    assert read_decoding(given, 99) == (sampling, ends)
    assert given == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"repetition_penalty": 1.2}, "the task sets repetition_penalty=1.2 .*; it reads max_new_tokens, max_gen_toks"),
        ({"top_k": 50}, "top_k=50"),
        ({"length_penalty": 1}, "length_penalty=1"),
        ({"until": 3}, "until=3; give a text or a list of texts"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ],
)
def test_decoding_that_we_do_not_do_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_decoding(given, 99)


def test_an_answer_ends_at_the_first_of_its_ends() -> None:
    assert cut_answer(" one. Question: two ", ("Q:", "Question:", "two")) == "one."
    assert cut_answer("one", ("Q:",)) == "one"
    assert cut_answer("Q: one", ("Q:",)) == ""


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def image(url: Any) -> dict[str, Any]:
    return {"type": "image", "url": url}


def test_messages_become_images_and_turns() -> None:
    picture = Image.new("RGB", (4, 4))
    messages = [
        {"role": "user", "content": [image(picture), text("What?")]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [text("And"), image("b.png"), text("this?")]},
    ]
    images, turns = read_messages(messages)
    assert images == [picture, "b.png"]
    assert [turn["value"] for turn in turns] == ["<image>\nWhat?", "A cat.", "And\n<image>\nthis?"]
    assert [turn["from"] for turn in turns] == ["human", "gpt", "human"]


def test_tags_of_the_words_are_the_images_places() -> None:
    parts = [image("a.png"), image("b.png"), text("Is <image> left of <image>?")]
    images, turns = read_messages([{"role": "user", "content": parts}])
    assert images == ["a.png", "b.png"]
    assert turns[0]["value"] == "Is <image> left of <image>?"
    assert read_messages([{"role": "user", "content": [text("No image.")]}])[1][0]["value"] == "No image."


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "system", "content": "Be brief."}, "role 'system'; layerfuse_llava reads user and assistant"),
        ({"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}, "part 'video'; .* reads texts and images"),
    ],
)
def test_other_messages_are_refused(message: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read_messages([message])


# A stand-in of lmms-eval's registry, and what importing our entry point loads.
REGISTRY = """
import sys, types
from collections import namedtuple
for name in ("lmms_eval", "lmms_eval.models", "lmms_eval.models.registry_v2"):
    sys.modules[name] = types.ModuleType(name)
manifest = namedtuple("ModelManifest", "model_id simple_class_path chat_class_path")
sys.modules["lmms_eval.models.registry_v2"].ModelManifest = manifest
from integrations.llava.harness import lmms_eval_manifest
made = lmms_eval_manifest()
print(made.model_id, made.simple_class_path, made.chat_class_path)
print(*[name for name in ("torch", "transformers", "tqdm", "PIL") if name in sys.modules])
"""


def test_the_entry_point_names_both_classes_and_loads_nothing(root: Path) -> None:
    command = [sys.executable, "-c", REGISTRY]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=600)
    named, loaded = result.stdout.split("\n", 1)
    module = "integrations.llava.harness.lmms_eval_models"
    assert named == f"layerfuse_llava {module}.LmmsEvalSimple {module}.LmmsEvalChat"
    assert loaded.strip() == ""
    source = (root / "integrations/llava/harness/lmms_eval_models.py").read_text(encoding="utf-8")
    assert "class LmmsEvalSimple(lmms):" in source
    assert "class LmmsEvalChat(LmmsEvalSimple):" in source
    declared = (root / "pyproject.toml").read_text(encoding="utf-8")
    entry = 'layerfuse_llava = "integrations.llava.harness:lmms_eval_manifest"'
    assert f'[project.entry-points."lmms_eval.models"]\n{entry}\n' in declared
