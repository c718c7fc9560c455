"""Decoding that is compiled: the same answers, and one program for prompts of many lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CompileConfig

from integrations.llava.config import InjectionConfig
from integrations.llava.inference import Conversation
from integrations.llava.inference import predictor as predictor_module
from integrations.llava.inference.predictor import Predictor, load_predictor
from integrations.llava.inference.sampling import SamplingParams
from integrations.llava.modeling import compilation
from layerfuse.errors import InputError
from tests.integrations.llava.inference.answering_parts import PROMPTS, save_run


class Compiler:
    """A backend that generates no code, and counts what it is given."""

    def __init__(self) -> None:
        self.programs = 0
        # The switch: the CPU compiles as CUDA does.
        self.config = CompileConfig(backend=self.compile, fullgraph=True, mode=None)  # type: ignore[arg-type]
        self.config._compile_all_devices = True  # type: ignore[assignment]

    def compile(self, graph: Any, _: Any) -> Any:
        self.programs += 1
        return graph.forward

    def __deepcopy__(self, _: Any) -> Compiler:
        return self


@pytest.mark.parametrize("injects", [False, True])
def test_prompts_of_many_lengths_share_a_program(
    injects: bool, predictor: Predictor, backbone_folder: Path, mixture: list[Any], tmp_path: Path
) -> None:
    if injects:
        injection = InjectionConfig(pairs=((1, 0), (4, 1)))
        predictor = load_predictor(save_run(tmp_path / "run", backbone_folder, injection=injection))
    torch.compiler.reset()
    compiler = Compiler()
    compiled = Predictor(predictor.model, predictor.processor, compile=compiler.config)

    for images, prompt in zip(mixture[:3], PROMPTS, strict=False):
        answer = compiled([images] * 3, [prompt] * 3, max_new_tokens=6, batch_size=3)
        assert answer == predictor([images] * 3, [prompt] * 3, max_new_tokens=6)
    assert compiled(mixture, PROMPTS, max_new_tokens=8, batch_size=3) == predictor(mixture, PROMPTS, max_new_tokens=8)
    assert compiler.programs == 1
    torch.compiler.reset()


def test_a_conversation_is_decoded_by_one_program(predictor: Predictor, pictures: list[Image.Image]) -> None:
    torch.compiler.reset()
    compiler = Compiler()
    compiled = Predictor(predictor.model, predictor.processor, compile=compiler.config)
    conversations = [Conversation(each, SamplingParams(max_new_tokens=6)) for each in (compiled, predictor)]
    for text, shown in (("What number?", pictures[:1]), ("Sure?", []), ("And this?", pictures[1:2])):
        answers = []
        for conversation in conversations:
            conversation.shown = list(shown)
            answers.append("".join(conversation.say(text)))
        assert answers[0] == answers[1]
    assert compiler.programs == 1
    torch.compiler.reset()


def test_beams_and_a_smaller_last_batch_are_answered_too(run: Path, predictor: Predictor, mixture: list[Any]) -> None:
    compiled = load_predictor(run, compile=True)
    for sampling in (SamplingParams(max_new_tokens=8, num_beams=2), SamplingParams(max_new_tokens=8)):
        expected = predictor(mixture, PROMPTS, sampling=sampling)
        assert compiled(mixture, PROMPTS, sampling=sampling, batch_size=3) == expected


def test_what_compiling_lacks_is_told_before_a_model_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> Any:
        raise ImportError("Triton is nowhere")

    monkeypatch.setattr(compilation, "_BACKEND", missing)
    monkeypatch.setattr(predictor_module, "load_model", lambda *_, **__: pytest.fail("a model was read"))
    # A GPU that there need not be.
    monkeypatch.setattr(predictor_module, "usable_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch, "ones", lambda size, **_: torch.zeros(size))
    with pytest.raises(InputError, match=r"compile needs a compiler, .* for cuda here \(.*Triton is nowhere.*leave"):
        load_predictor(run, compile=True)
