"""Fuser and projector alone: published stage-1 files are read, ours are written as those."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from integrations.llava.checkpoints import convert, convert_connector
from integrations.llava.checkpoints.connector import load_connector, save_connector
from integrations.llava.checkpoints.model_io import load_model
from integrations.llava.modeling.model import FusedLlavaForConditionalGeneration

PARTS = ("fuser", "projector")


@pytest.fixture(scope="module")
def published(mmfuser_folder: Path) -> dict[str, torch.Tensor]:
    """The published projector, as its stage 1 saves it."""
    weights = load_file(mmfuser_folder / "model.safetensors")
    return {name: tensor for name, tensor in weights.items() if "mm_projector" in name}


@pytest.fixture(scope="module")
def ours(mmfuser_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(mmfuser_folder, tmp_path_factory.mktemp("converted") / "ours")


def forget(model: FusedLlavaForConditionalGeneration) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "fuser" in name or "projector" in name:
                parameter.fill_(7)


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
@pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model."])
def test_a_published_adapter_is_loaded_into_a_model(
    suffix: str, prefix: str, published: dict[str, torch.Tensor], ours: Path, tmp_path: Path
) -> None:
    file = tmp_path / f"mm_projector.{suffix}"
    named = {name.replace("model.", prefix, 1): tensor for name, tensor in published.items()}
    if suffix == "bin":
        torch.save(named, file)
    else:
        save_file(named, file)
    model = load_model(ours)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forget(model)
    load_connector(model, PARTS, file)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_a_published_baseline_adapter_is_loaded_into_a_baseline(llava_folder: Path, tmp_path: Path) -> None:
    model = load_model(convert(llava_folder, tmp_path / "ours"))
    expected = model.model.multi_modal_projector.linear_2.weight.clone()
    adapter = convert_connector(tmp_path / "ours", tmp_path / "adapter", "llava")
    assert sorted(torch.load(adapter)) == [
        f"model.mm_projector.{place}.{kind}" for place in (0, 2) for kind in ("bias", "weight")
    ]
    forget(model)
    load_connector(model, PARTS, adapter)
    assert torch.equal(model.model.multi_modal_projector.linear_2.weight, expected)


@pytest.mark.parametrize("what", ["checkpoint", "ours", "file", "adapter folder"])
def test_an_adapter_is_written_as_the_published_stage_saves_it(
    what: str, published: dict[str, torch.Tensor], ours: Path, mmfuser_folder: Path, tmp_path: Path
) -> None:
    file = save_connector(load_model(ours), PARTS, tmp_path / "stage" / "adapter.safetensors")
    places = {"checkpoint": mmfuser_folder, "ours": ours, "file": file, "adapter folder": file.parent}
    # Of another stage, beside the checkpoint.
    assert (mmfuser_folder / "mm_projector.bin").is_file()
    written = convert_connector(places[what], tmp_path / "out", "mmfuser")
    assert written.name == "mm_projector.bin"
    found = torch.load(written, weights_only=True)
    assert sorted(found) == sorted(published)
    assert all(torch.equal(found[name], tensor) for name, tensor in published.items())


def test_a_published_adapter_becomes_ours(published: dict[str, torch.Tensor], ours: Path, tmp_path: Path) -> None:
    torch.save(published, tmp_path / "mm_projector.bin")
    written = convert_connector(tmp_path / "mm_projector.bin", tmp_path / "out")
    model = load_model(ours)
    expected = save_connector(model, PARTS, tmp_path / "expected.safetensors")
    assert written.name == "adapter.safetensors"
    found, wanted = load_file(written), load_file(expected)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("change", ["missing", "renamed", "zero"])
def test_an_adapter_that_lost_its_scales_is_refused_everywhere(
    change: str, published: dict[str, torch.Tensor], ours: Path, tmp_path: Path
) -> None:
    weights = dict(published)
    for number in "12":
        scale = weights.pop(f"model.mm_projector.0.gamma{number}")
        if change == "renamed":
            weights[f"model.mm_projector.0.weight{number}"] = scale
        elif change == "zero":
            weights[f"model.mm_projector.0.gamma{number}"] = torch.zeros_like(scale)
    torch.save(weights, tmp_path / "mm_projector.bin")
    model = load_model(ours)
    before = model.model.fuser.output_scale.scale.clone()
    message = "gamma1 is zero everywhere" if change == "zero" else "lack gamma1, gamma2"
    with pytest.raises(ValueError, match=message):
        load_connector(model, PARTS, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=message):
        convert_connector(tmp_path / "mm_projector.bin", tmp_path / "out")
    assert torch.equal(model.model.fuser.output_scale.scale, before)


def test_adapters_that_do_not_fit_are_refused(
    published: dict[str, torch.Tensor], llava_folder: Path, ours: Path, tmp_path: Path
) -> None:
    torch.save(published, tmp_path / "mm_projector.bin")
    baseline = load_model(convert(llava_folder, tmp_path / "baseline"))
    with pytest.raises(ValueError, match=r"does not fit the fuser, projector .* unexpected: model.fuser.cross_attn"):
        load_connector(baseline, PARTS, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="has a fuser, so its connector has the layout 'mmfuser'"):
        convert_connector(ours, tmp_path / "out", "llava")
    with pytest.raises(ValueError, match="has no fuser, so its connector has the layout 'llava'"):
        convert_connector(tmp_path / "baseline", tmp_path / "out", "mmfuser")
    with pytest.raises(ValueError, match="the layout llava-hf has no files of connectors; give one of layerfuse"):
        convert_connector(ours, tmp_path / "out", "llava-hf")
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds neither a fuser nor a projector"):
        convert_connector(tmp_path / "other.safetensors", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        convert_connector(tmp_path / "nowhere", tmp_path / "out")


def test_a_fuser_the_published_code_does_not_have_is_not_written(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="published code has only 'mmfuser' over 5 layers"):
        convert_connector(run_folder, tmp_path, "mmfuser")


def test_the_name_that_0_1_had_for_converting_a_connector_still_does() -> None:
    with pytest.warns(DeprecationWarning, match="convert_connector"):
        from integrations.llava.checkpoints import convert_adapter
    assert convert_adapter is convert_connector
