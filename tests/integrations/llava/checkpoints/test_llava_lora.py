"""LoRA folders as the published code writes them: read, merged, converted, refused where something is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from integrations.llava.checkpoints import Options, convert, layout_of, load_model, load_processor
from integrations.llava.checkpoints.tensors import stored_model
from integrations.llava.cli import train as train_command
from integrations.llava.cli.convert import main
from integrations.llava.inference import load_predictor
from integrations.llava.inference.results import weights_fingerprint
from tests.integrations.llava.checkpoints.foreign import save_published
from tests.integrations.llava.tiny_parts import RunsCode

TARGETS = ["q_proj", "v_proj", "down_proj"]


class _Published(nn.Module):
    """The published model's modules by name, as far as adapters see them: whatever has a weight is linear."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            place, _, kind = name.rpartition(".")
            if kind == "weight" and place.rpartition(".")[2] in TARGETS and "vision" not in name:
                parent: nn.Module = self
                *path, last = place.split(".")
                for part in path:
                    if part not in dict(parent.named_children()):
                        parent.add_module(part, nn.Module())
                    parent = parent.get_submodule(part)
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight.data = weight.clone()
                parent.add_module(last, linear)


def save_adapted(base: Path, folder: Path, *, kind: str = "bin", rslora: bool = False) -> dict[str, torch.Tensor]:
    """Write a LoRA folder beside a published checkpoint, and give the weights that PEFT merges it to."""
    weights = {name: tensor.read() for name, tensor in stored_model(base).items()}
    torch.manual_seed(1)
    adapted: Any = peft.get_peft_model(
        _Published(weights),  # type: ignore[arg-type]
        peft.LoraConfig(r=4, lora_alpha=12, target_modules=TARGETS, use_rslora=rslora, init_lora_weights=False),
    )
    adapted.save_pretrained(folder, safe_serialization=True)
    if kind == "bin":
        file = folder / "adapter_model.safetensors"
        torch.save(load_file(file), folder / "adapter_model.bin")
        file.unlink()
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(described | {"base_model_name_or_path": base.name}))
    moved = {name: tensor + 0.1 for name, tensor in weights.items() if "mm_projector" in name}
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in moved.items()}, folder / "non_lora_trainables.bin"
    )
    shutil.copy(base / "config.json", folder)
    return weights | moved | dict(adapted.merge_and_unload().state_dict())


@pytest.fixture
def base(published_llm: LlavaForConditionalGeneration, tmp_path: Path) -> Path:
    """A published MMFuser checkpoint that adapters are trained on."""
    save_published(published_llm, tmp_path / "base")
    return tmp_path / "base"


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(2)
    image = model.config.image_token_index
    ids = torch.tensor([[1, *[image] * model.config.image_seq_length, 40, 41, 42]])
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, pixel_values=torch.randn(1, 3, 32, 32)).logits
    return found


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("rslora", [False, True])
def test_a_lora_folder_is_the_model_that_peft_merges(kind: str, rslora: bool, base: Path, tmp_path: Path) -> None:
    merged = save_adapted(base, tmp_path / "lora", kind=kind, rslora=rslora)
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    for file in whole.glob("model*.safetensors*"):
        file.unlink()
    save_file(merged, whole / "model.safetensors")

    assert layout_of(tmp_path / "lora") == "mmfuser"
    expected = logits(load_model(convert(whole, tmp_path / "expected")))
    for found in (load_model(tmp_path / "lora"), load_model(convert(tmp_path / "lora", tmp_path / "ours"))):
        torch.testing.assert_close(logits(found), expected, atol=1e-5, rtol=0)
    assert (logits(load_model(base)) - expected).abs().max() > 0.01


def test_a_lora_folder_answers_and_goes_back_to_the_published_layout(base: Path, tmp_path: Path) -> None:
    save_adapted(base, tmp_path / "lora")
    own = load_predictor(convert(tmp_path / "lora", tmp_path / "ours"))
    back = convert(
        tmp_path / "lora", tmp_path / "back", "mmfuser", options=Options(vision_tower=str(base.parent / "tiny-clip"))
    )

    assert load_predictor(tmp_path / "lora")([None], ["What number?"]) == own([None], ["What number?"])
    torch.testing.assert_close(logits(load_model(back)), logits(own.model))
    assert (back / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    other = Path(shutil.copytree(tmp_path / "lora", tmp_path / "other"))
    _another_model_s(other)
    assert weights_fingerprint(other) != weights_fingerprint(tmp_path / "lora"), "answers of both never mix"
    assert load_processor(tmp_path / "lora").chat_template == load_processor(tmp_path / "ours").chat_template


def test_a_base_elsewhere_is_given_by_an_option(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_adapted(base, tmp_path / "lora")
    elsewhere = tmp_path / "x" / "moved"
    elsewhere.parent.mkdir()
    base.rename(elsewhere)
    command = ["--from", str(tmp_path / "lora"), "--to", str(tmp_path / "ours")]
    with pytest.raises(SystemExit):
        main(command)
    said = capsys.readouterr().err
    assert "'base' is no folder beside the checkpoint" in said and "--base FOLDER (convert)" in said
    assert main([*command, "--base", str(elsewhere)]) == 0
    options = Options(base=str(elsewhere))
    torch.testing.assert_close(
        logits(load_model(tmp_path / "lora", options=options)), logits(load_model(tmp_path / "ours"))
    )


def test_training_goes_on_from_a_lora_folder(
    base: Path, data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapted(base, tmp_path / "lora")
    told = ["--data", str(data_folder / "train.json"), "--image-folder", str(data_folder), "--finetune.max_steps", "1"]
    still = ["--finetune.learning_rate", "0", "--finetune.lora.rank", "2"]
    run = ["--from", str(tmp_path / "lora"), "--output", str(tmp_path / "run")]
    assert train_command.main([*run, *told, *still]) == 0

    expected = load_model(tmp_path / "lora")
    torch.testing.assert_close(logits(load_model(tmp_path / "run")), logits(expected), atol=1e-5, rtol=0)
    base.rename(tmp_path / "moved")
    assert train_command.main([*run, *told, *still, "--overwrite"]) == 2
    assert "--model.checkpoint_base FOLDER (train)" in capsys.readouterr().err
    place = ["--model.checkpoint_base", str(tmp_path / "moved")]
    assert train_command.main([*run, *told, *still, "--overwrite", *place]) == 0


def _without_name(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))


def _without_others(folder: Path) -> None:
    (folder / "non_lora_trainables.bin").unlink()


def _code(folder: Path) -> None:
    torch.save({"x": RunsCode(folder / "ran")}, folder / "non_lora_trainables.bin")


def _another_model_s(folder: Path) -> None:
    weights = torch.load(folder / "adapter_model.bin", weights_only=True)
    weights = {name.replace("layers.0", "layers.9"): tensor for name, tensor in weights.items()}
    torch.save(weights, folder / "adapter_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_name, "holds adapters and does not say for which model. Give its folder"),
        (_without_others, "no non_lora_trainables.bin with the projector"),
        (_code, "Python objects, which run code"),
        (_another_model_s, r"do not fit these weights of the model: model.layers.9"),
    ],
)
def test_a_lora_folder_that_is_not_whole_is_refused(spoil: Any, message: str, base: Path, tmp_path: Path) -> None:
    save_adapted(base, tmp_path / "lora")
    spoil(tmp_path / "lora")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(tmp_path / "lora")
    assert not (tmp_path / "lora" / "ran").exists()
