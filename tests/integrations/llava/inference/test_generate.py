"""Answers: the same at every batch size, whatever computes them; and what a checkpoint has to hold."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, CompileConfig

from integrations.llava.inference.predictor import Predictor, default_dtype, load_predictor
from integrations.llava.inference.prompt_builder import Preparer, load_preparer
from integrations.llava.inference.sampling import SamplingParams
from integrations.llava.prompts import get_template
from tests.integrations.llava.inference.answering_parts import PROMPTS, SAMPLED, save_run

# The same at every batch size


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(max_new_tokens=16), SamplingParams(max_new_tokens=12, num_beams=3), SAMPLED],
    ids=["greedy", "beams", "sampled"],
)
def test_answers_do_not_depend_on_the_batch_size(
    predictor: Predictor, mixture: list[Any], sampling: SamplingParams
) -> None:
    one, three, eight = (predictor(mixture, PROMPTS, batch_size=size, sampling=sampling) for size in (1, 3, 8))

    assert one == three == eight
    assert all(one)
    assert len({len(answer) for answer in one}) > 3  # they end at different places


def test_answers_depend_on_image_and_prompt(predictor: Predictor, pictures: list[Image.Image]) -> None:
    answers = predictor(pictures[:4] * 2, ["What?"] * 4 + ["Sure?"] * 4, max_new_tokens=12)

    assert len(set(answers)) == 8


def test_left_padding_moves_positions_with_the_text(predictor: Predictor, mixture: list[Any]) -> None:
    samples = [predictor.prepare(images, prompt) for images, prompt in zip(mixture, PROMPTS, strict=True)]
    batch = predictor.collate(samples)
    seen: dict[str, Any] = {}
    hook = predictor.model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True
    )
    predictor.answer_batch(batch, [""] * 8, SamplingParams(max_new_tokens=1))
    hook.remove()

    for row, sample in enumerate(samples):
        own = seen["position_ids"][row, -len(sample["input_ids"]) :]
        assert torch.equal(own, torch.arange(len(own)))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_padding_changes_logits_by_rounding_only(
    run: Path, mixture: list[Any], dtype: torch.dtype, tolerance: float
) -> None:
    predictor = load_predictor(run, dtype=dtype)
    samples = [predictor.prepare(images, prompt) for images, prompt in zip(mixture, PROMPTS, strict=True)]
    batch = predictor.collate(samples)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        padded = predictor.model(**batch, position_ids=positions).logits[:, -1, :-1]
        alone = torch.cat([predictor.model(**predictor.collate([own])).logits[:, -1, :-1] for own in samples])

    assert alone.float().std() > 0.5
    torch.testing.assert_close(padded, alone, atol=tolerance, rtol=0)


def test_beams_see_their_own_prompts_images(predictor: Predictor, mixture: list[Any]) -> None:
    batch = predictor.collate([predictor.prepare(images, "What?") for images in mixture])
    seen: list[torch.Tensor] = []
    hook = predictor.model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    predictor.answer_batch(batch, [""] * 8, SamplingParams(max_new_tokens=1))
    predictor.answer_batch(batch, [""] * 8, SamplingParams(max_new_tokens=1, num_beams=2))
    hook.remove()

    torch.testing.assert_close(seen[1], seen[0].repeat_interleave(2, 0), atol=1e-4, rtol=0)


# Other ways to compute the same


def test_a_static_cache_gives_the_same_answers(run: Path, predictor: Predictor, mixture: list[Any]) -> None:
    compiled = load_predictor(run, compile=True)

    assert compiled(mixture, PROMPTS, max_new_tokens=12) == predictor(mixture, PROMPTS, max_new_tokens=12)


def test_decoding_is_one_graph_for_torch_compile(run: Path, mixture: list[Any]) -> None:
    model = load_predictor(run).model
    prepare = load_preparer(run)
    sample = prepare(mixture[0], PROMPTS[0])
    inputs = {"input_ids": sample["input_ids"][None], "pixel_values": sample["pixel_values"], "max_new_tokens": 6}
    expected = model.generate(**inputs, do_sample=False)
    # Tracing without code generation; fullgraph fails where the graph breaks. The switch: CPU compiles as CUDA does.
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    compiled = model.generate(**inputs, do_sample=False, cache_implementation="static", compile_config=config)

    assert torch.equal(compiled, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_can_be_chosen(
    run: Path, predictor: Predictor, pictures: list[Image.Image], implementation: str
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(run, attn_implementation=implementation)

    assert model.model.language_model.config._attn_implementation == implementation
    assert Predictor(model, predictor.processor)(pictures[:1], ["What?"]) == predictor(pictures[:1], ["What?"])


def test_generate_takes_no_images_for_none(predictor: Predictor) -> None:
    ids = predictor.prepare(None, "What?")["input_ids"][None]
    ends = {"max_new_tokens": 4, "do_sample": False}

    with_none = predictor.model.generate(input_ids=ids, pixel_values=None, **ends)
    assert torch.equal(with_none, predictor.model.generate(input_ids=ids, **ends))


@pytest.mark.parametrize(("quantize", "kind"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_quantised_models_answer(
    quantize: Any, kind: str, backbone_folder: Path, mixture: list[Any], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    predictor = load_predictor(save_run(tmp_path / "run", backbone_folder, width=64), quantize=quantize)
    kinds: dict[str, set[str]] = {}
    for name, module in predictor.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            kinds.setdefault(name.removeprefix("model.").partition(".")[0], set()).add(type(module).__name__)

    assert kinds.pop("language_model") == {kind}
    assert kinds == {
        "vision_tower": {"Linear"},
        "fuser": {"Linear"},
        "multi_modal_projector": {"Linear"},
        "lm_head": {"Linear"},
    }
    assert all(predictor(mixture, PROMPTS, max_new_tokens=4))


def test_without_bitsandbytes_the_way_to_get_it_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("integrations.llava.modeling.quantization.find_spec", lambda _: None)

    with pytest.raises(ImportError, match=r"pip install 'layerfuse\[quantize\]'"):
        load_predictor(run, quantize="nf4")


def test_an_unknown_quantisation_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match="nf8.*known: int8, nf4, none|nf8.*Known"):
        load_predictor(run, quantize="nf8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stored", "device", "quantize", "expected"),
    [
        ("float32", "cpu", "none", torch.float32),
        ("float32", "cuda", "none", torch.bfloat16),
        ("float16", "cuda", "none", torch.float16),
        ("bfloat16", "cpu", "nf4", torch.bfloat16),
        ("bfloat16", "cuda", "int8", torch.float16),
    ],
)
def test_the_dtype_is_the_checkpoints_unless_that_is_slow(
    stored: str, device: str, quantize: Any, expected: torch.dtype, run: Path, tmp_path: Path
) -> None:
    config = json.loads((run / "config.json").read_text()) | {"dtype": stored}
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert default_dtype(tmp_path, torch.device(device), quantize) == expected
    assert load_predictor(run).model.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_on_cuda_every_way_of_loading_answers(
    quantize: Any, backbone_folder: Path, mixture: list[Any], tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    predictor = load_predictor(save_run(tmp_path / "run", backbone_folder, width=64), quantize=quantize)

    assert predictor.model.dtype == (torch.float16 if quantize == "int8" else torch.bfloat16)
    assert {parameter.device.type for parameter in predictor.model.parameters()} == {"cuda"}
    assert {buffer.device.type for buffer in predictor.model.buffers()} == {"cuda"}
    assert all(predictor(mixture, PROMPTS, max_new_tokens=4))
    assert predictor(mixture, PROMPTS, sampling=SAMPLED) == predictor(mixture, PROMPTS, sampling=SAMPLED)


@pytest.mark.gpu
def test_on_cuda_batches_and_compiled_decoding_give_the_same_answers(run: Path, mixture: list[Any]) -> None:
    predictor = load_predictor(run, dtype=torch.float32)
    answers = predictor(mixture, PROMPTS, max_new_tokens=12)
    compiled = load_predictor(run, dtype=torch.float32, compile=True)

    assert predictor(mixture, PROMPTS, max_new_tokens=12, batch_size=1) == answers
    assert compiled(mixture, PROMPTS, max_new_tokens=12) == answers


# What a checkpoint has to hold


def test_the_template_is_the_checkpoints_whatever_its_folder_is_called(
    run: Path, predictor: Predictor, pictures: list[Image.Image], tmp_path: Path
) -> None:
    for name in ("llava-v1.5-qwen-plain-llama3", "brief"):
        shutil.copytree(run, tmp_path / name)
        renamed = load_predictor(tmp_path / name)

        assert renamed.prepare.template == get_template("v1")
        assert renamed(pictures[:2], PROMPTS[:2], max_new_tokens=8) == predictor(
            pictures[:2], PROMPTS[:2], max_new_tokens=8
        )


def test_a_checkpoint_without_template_is_refused_with_the_way_out(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "vicuna-v1")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"prompt_template": None}))
    (folder / "model.safetensors").unlink()  # it is refused before weights are read

    with pytest.raises(ValueError, match=r'no prompt_template.*get_template\("v1"\).to_dict\(\)'):
        load_predictor(folder)


def test_a_processor_of_another_kind_is_refused(predictor: Predictor) -> None:
    @dataclasses.dataclass
    class Other:
        image_processor: object = None

    with pytest.raises(ValueError, match="expected LayerfuseImageProcessor"):
        Predictor(predictor.model, Other())  # type: ignore[arg-type]


def test_preparing_can_be_sent_to_worker_processes(run: Path, pictures: list[Image.Image]) -> None:
    preparer = load_preparer(run)
    sent: Preparer = pickle.loads(pickle.dumps(preparer))

    assert torch.equal(sent(pictures[0], "What?")["input_ids"], preparer(pictures[0], "What?")["input_ids"])


def test_numbers_of_images_and_prompts_have_to_agree(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="got 2 images for 1 prompts"):
        predictor([None, None], ["a"])


def test_an_empty_batch_size_is_refused(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="batch_size=0 is too small"):
        predictor([None], ["a"], batch_size=0)
