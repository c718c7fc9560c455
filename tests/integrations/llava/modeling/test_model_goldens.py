"""The whole model, converted from the published checkpoint, against what the published code recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from integrations.llava.checkpoints import convert, convert_connector, layout_of
from integrations.llava.checkpoints.connector import load_connector
from integrations.llava.checkpoints.model_io import load_model
from integrations.llava.checkpoints.tensors import stored_model, stored_tensors
from tests.integrations.llava.modeling.model_goldens_support import CASES, PROMPTS, RECORDED, Case, Run, recorded_names

FUSER = "model.mm_projector.0."
# What a file of cases may hold; each of these is compared below.
COMPARED = {
    "attention_mask",
    "expanded.attention_mask",
    "expanded.inputs_embeds",
    "expanded.labels",
    "fuser.output",
    "input_ids",
    "labels",
    "logits",
    "loss",
    "pixel_values",
    "projector.output",
    "vision.stack",
}


@pytest.fixture(scope="module")
def converted(goldens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(goldens / "tiny_llava" / "checkpoint", tmp_path_factory.mktemp("converted") / "ours")


@pytest.fixture(scope="module")
def run(converted: Path) -> Run:
    return Run(converted)


def test_everything_recorded_in_the_goldens_is_compared(goldens: Path) -> None:
    recorded = recorded_names()
    answers = recorded.pop("generation")
    assert set(recorded) == set(CASES) and CASES
    for name, tensors in recorded.items():
        assert {tensor for tensor in tensors - COMPARED if not tensor.startswith("grad.")} == set(), name
    kinds = {name.rpartition(".")[2] for name in answers}
    assert {name.rpartition(".")[0] for name in answers} <= set(PROMPTS)
    assert kinds == {"input_ids", "output_ids", "scores"}


@pytest.mark.parametrize("name", CASES)
def test_expansion_and_truncation_of_goldens(name: str, run: Run) -> None:
    case = Case(name)
    batch = run.batch(case)
    assert torch.equal(batch["attention_mask"], case.tensors["expanded.attention_mask"].long())
    assert torch.equal(batch["labels"], case.tensors["expanded.labels"])


@pytest.mark.parametrize("name", CASES)
def test_vision_side_of_goldens(name: str, run: Run) -> None:
    case = Case(name)
    compared = [comparison.name for comparison in run.vision(case) if comparison.check() is None]
    assert set(compared) == {"vision.stack", "fuser.output", "projector.output"} & set(case.tensors)


@pytest.mark.parametrize("name", CASES)
def test_embeddings_logits_and_loss_of_goldens(name: str, run: Run) -> None:
    for comparison in run.text(Case(name)):
        comparison.check()


@pytest.mark.parametrize("name", [name for name in CASES if any("grad." in key for key in Case(name).tensors)])
def test_gradients_of_goldens(name: str, run: Run) -> None:
    case = Case(name)
    compared = [comparison.name for comparison in run.gradients(case) if comparison.check() is None]
    assert set(compared) == {tensor for tensor in case.tensors if tensor.startswith("grad.")} and compared


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_answers_of_goldens(name: str, run: Run) -> None:
    """Alone and in a batch padded on the left; a text-only prompt has no black image here, which changes nothing."""
    for ids, expected, scores in run.answers(name):
        assert ids == expected
        if scores is not None:
            scores.check()


# The checkpoint itself


def test_the_goldens_checkpoint_goes_back_as_it_came(converted: Path, tmp_path: Path) -> None:
    back = convert(converted, tmp_path / "back", "mmfuser")
    was, now = stored_model(RECORDED / "checkpoint"), stored_model(back)
    assert sorted(was) == sorted(now)
    for name, tensor in was.items():
        assert tensor.dtype == now[name].dtype and torch.equal(tensor.read(), now[name].read()), name
    for path in (RECORDED / "checkpoint").iterdir():
        if path.suffix != ".safetensors":
            assert (back / path.name).read_bytes() == path.read_bytes(), path.name
    assert layout_of(back) == layout_of(RECORDED / "checkpoint") == "mmfuser"


def test_the_converted_goldens_load_with_transformers_too(converted: Path, run: Run) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(converted)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_the_stage_1_adapter_of_the_goldens_is_loaded_and_written(suffix: str, converted: Path, tmp_path: Path) -> None:
    (adapter,) = (RECORDED / "stage1_adapter").glob(f"*.{suffix}")
    model = load_model(converted)
    load_connector(model, ("fuser", "projector"), adapter)
    stored = {name: tensor.read() for name, tensor in stored_tensors(adapter).items()}
    assert torch.equal(model.model.fuser.output_scale.scale, stored[f"{FUSER}gamma1"])
    assert torch.equal(model.model.multi_modal_projector.linear_2.bias, stored["model.mm_projector.3.bias"])
    ours = convert_connector(adapter, tmp_path / "ours")
    again = torch.load(convert_connector(ours, tmp_path / "published", "mmfuser"), weights_only=True)
    assert again.keys() == stored.keys() and all(torch.equal(again[name], stored[name]) for name in stored)


def remove(weights: dict[str, torch.Tensor]) -> None:
    for number in "12":
        del weights[f"{FUSER}gamma{number}"]


def rename(weights: dict[str, torch.Tensor]) -> None:
    for number in "12":
        weights[f"{FUSER}weight{number}"] = weights.pop(f"{FUSER}gamma{number}")


def zero(weights: dict[str, torch.Tensor]) -> None:
    for number in "12":
        weights[f"{FUSER}gamma{number}"].zero_()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "lack gamma1, gamma2; without them the block would be the identity"),
        (rename, r"lack gamma1, gamma2 \(found instead: weight1, weight2\)"),
        (zero, "gamma1 is zero everywhere although the fuser was trained"),
    ],
)
def test_the_goldens_checkpoint_without_its_scales_is_refused(
    damage: Callable[[Any], None], message: str, converted: Path, run: Run, tmp_path: Path
) -> None:
    tower = run.published["mm_vision_tower"]
    shutil.copytree(RECORDED / tower, tmp_path / tower)
    source = tmp_path / "checkpoint"
    source.mkdir()
    for path in (RECORDED / "checkpoint").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    damage(weights)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    with pytest.raises(ValueError, match=message):
        load_model(source)
    adapter = tmp_path / "mm_projector.safetensors"
    save_file({name: tensor for name, tensor in weights.items() if "mm_projector" in name}, adapter)
    with pytest.raises(ValueError, match=message):
        load_connector(load_model(converted), ("fuser", "projector"), adapter)


def test_the_notes_of_the_goldens_agree_with_their_files(goldens: Path) -> None:
    notes = json.loads((RECORDED / "cases.json").read_text())
    for name in CASES:
        assert Case(name).tensors["loss"].item() == pytest.approx(notes["cases"][name]["loss"], abs=1e-7)
