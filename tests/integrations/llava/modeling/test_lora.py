"""LoRA and QLoRA: adapters in the language model alone, saved as PEFT saves them, merged exactly."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from integrations.llava.checkpoints import convert
from integrations.llava.checkpoints.lora import load_lora, merged_tensors, save_lora
from integrations.llava.checkpoints.model_io import load_model, save_model
from integrations.llava.checkpoints.tensors import stored_model
from integrations.llava.config.schema import LoraConfig
from integrations.llava.modeling.build import build_model
from integrations.llava.modeling.lora import add_lora, merge_lora
from integrations.llava.modeling.model import FusedLlavaForConditionalGeneration
from integrations.llava.modeling.processing import add_image_token, build_processor
from integrations.llava.modeling.quantization import quantization_config
from integrations.llava.prompts import get_template
from layerfuse.backbones import TransformersBackbone
from layerfuse.fusers import create_fuser
from layerfuse.testing import randomise_parameters
from tests.integrations.llava.tiny_parts import make_tokenizer, save_llm, tiny_clip

LORA = LoraConfig(rank=4, alpha=8.0)
TOKENS = 16
VOCABULARY = len(make_tokenizer("llama"))


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for bitsandbytes to pack on any CPU: multiples of 64."""
    return save_llm(tmp_path_factory.mktemp("llm"), hidden_size=64, intermediate_size=128)


def build(llm: Path, quantize: Any = "none", dtype: torch.dtype = torch.float32) -> FusedLlavaForConditionalGeneration:
    """The same model each time; its backbone, too, has layers called q_proj."""
    torch.manual_seed(1)
    backbone = TransformersBackbone(tiny_clip(num_hidden_layers=3), layers=(1, 2))
    fuser = randomise_parameters(create_fuser("mmfuser", in_channels=32, num_layers=2))
    config = quantization_config(quantize, dtype)
    causal = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype, quantization_config=config)
    template = get_template("v1").to_dict()
    return build_model(backbone, fuser, causal, image_token_id=VOCABULARY, prompt_template=template).eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, *[VOCABULARY] * TOKENS, 5, 6, 7]])
    labels = torch.where(ids == VOCABULARY, -100, ids)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**batch()).logits
    return found[..., :VOCABULARY]


def train(model: nn.Module) -> None:
    """Stand in for training: adapters away from their start, which is zero."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def test_new_adapters_change_nothing_and_stand_in_the_language_model_only(llm_folder: Path) -> None:
    model = build(llm_folder)
    before = logits(model)
    model.model.vision_tower.requires_grad_(False)
    add_lora(model, LORA)
    assert type(model) is FusedLlavaForConditionalGeneration
    assert torch.equal(logits(model), before)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = {name for name in learning if ".lora_" in name}
    assert len(adapters) == 2 * len(LORA.target_modules) * 2
    assert all(name.startswith("model.language_model.layers.") for name in adapters)
    rest = {name.split(".")[1] for name in learning - adapters}
    assert rest == {"fuser", "multi_modal_projector"}


def test_adapters_of_some_layers_only(llm_folder: Path) -> None:
    model = build(llm_folder)
    add_lora(model, LoraConfig(rank=2, target_modules=("q_proj", "v_proj")))
    assert sum(".lora_A." in name for name, _ in model.named_parameters()) == 4


def test_saved_adapters_are_loaded_by_us_by_peft_and_by_transformers(llm_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = build(llm_folder)
    plain = logits(model)
    add_lora(model, LORA)
    train(model)
    expected = logits(model)
    assert (expected - plain).abs().max() > 0.1
    save_lora(model, tmp_path / "lora")
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = build(llm_folder)
    load_lora(loaded, tmp_path / "lora")
    assert torch.equal(logits(loaded), expected)
    assert not any(parameter.requires_grad for name, parameter in loaded.named_parameters() if ".lora_" in name)
    assert torch.equal(logits(PeftModel.from_pretrained(build(llm_folder), tmp_path / "lora")), expected)
    other = build(llm_folder)
    other.load_adapter(str(tmp_path / "lora"))
    assert torch.equal(logits(other), expected)


def test_loaded_adapters_go_on_learning_if_asked_to(llm_folder: Path, tmp_path: Path) -> None:
    model = build(llm_folder)
    add_lora(model, LORA)
    save_lora(model, tmp_path)
    again = build(llm_folder)
    load_lora(again, tmp_path, trainable=True)
    learning = [name for name, parameter in again.named_parameters() if parameter.requires_grad and ".lora_" in name]
    assert len(learning) == 28
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if ".lora_" in name)


@pytest.mark.parametrize("learns", [True, False])
def test_adapters_are_put_in_by_a_config_that_peft_has_built(learns: bool, llm_folder: Path) -> None:
    import peft

    from integrations.llava.modeling import inject_lora

    model, other = build(llm_folder), build(llm_folder)
    targets = r"model\.language_model\..*\.(?:q_proj|v_proj)"
    config = peft.LoraConfig(r=2, target_modules=targets, inference_mode=not learns)
    inject_lora(model, config)
    adapters = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    assert len(adapters) == 8
    assert all(parameter.requires_grad is learns for parameter in adapters)
    # What the caller holds is his, and what he says beside it counts more.
    inject_lora(other, config, trainable=not learns)
    adapters = [parameter for name, parameter in other.named_parameters() if ".lora_" in name]
    assert all(parameter.requires_grad is not learns for parameter in adapters)
    assert config.inference_mode is not learns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_leaves_a_plain_model_that_computes_the_same(
    dtype: torch.dtype, llm_folder: Path, tmp_path: Path
) -> None:
    model = build(llm_folder, dtype=dtype)
    names = set(model.state_dict())
    add_lora(model, LORA)
    train(model)
    expected = logits(model)
    merge_lora(model)
    assert set(model.state_dict()) == names
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(logits(model), expected, atol=tolerance * float(expected.abs().max()), rtol=0)


def save_whole(model: FusedLlavaForConditionalGeneration, folder: Path) -> Path:
    tokenizer = make_tokenizer("llama")
    add_image_token(tokenizer)
    prepare = model.model.vision_tower.backbone.preprocessing
    return save_model(model, build_processor(model, tokenizer, prepare, get_template("v1")), folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_stored_weights_gives_the_same_numbers(dtype: torch.dtype, llm_folder: Path, tmp_path: Path) -> None:
    model = build(llm_folder, dtype=dtype)
    base = save_whole(model, tmp_path / "base")
    add_lora(model, LORA)
    train(model)
    save_lora(model, tmp_path / "lora")
    merge_lora(model)
    merged = convert(base, tmp_path / "merged", lora=tmp_path / "lora")
    stored = {name: tensor.read() for name, tensor in stored_model(merged).items()}
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(stored[name], tensor, atol=1e-6, rtol=0, msg=name)
    assert type(load_model(merged)) is FusedLlavaForConditionalGeneration


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_only_the_blocks_of_the_language_model_are_quantised(quantize: Any, llm_folder: Path, tmp_path: Path) -> None:
    folder = save_whole(build(llm_folder), tmp_path / "base")
    for model in (build(llm_folder, quantize), load_model(folder, quantize=quantize)):
        small = {
            name for name, module in model.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
        }
        assert len(small) == 14 and all(name.startswith("model.language_model.layers.") for name in small)


@pytest.mark.parametrize("sizes", [(32, 48), (128, 352)], ids=["tiny", "the demo's"])
def test_four_bit_weights_of_sizes_that_are_no_multiples_of_a_block_answer(
    sizes: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes packs weights when they are first used on a CPU, and failed on such sizes."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if sizes == (32, 48):  # no layer can be packed, so any CPU tells
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    hidden_size, intermediate_size = sizes
    llm = save_llm(tmp_path / "llm", hidden_size=hidden_size, intermediate_size=intermediate_size)
    folder = save_whole(build(llm), tmp_path / "whole")
    model, rounded = load_model(folder, quantize="nf4"), load_model(folder)
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            whole = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            rounded.get_submodule(name).weight.data.copy_(whole)

    expected = logits(rounded)
    # Layers that are packed multiply in bfloat16.
    tolerance = 1e-5 if sizes == (32, 48) else 2e-2
    torch.testing.assert_close(logits(model), expected, atol=tolerance * float(expected.abs().max()), rtol=0)


def test_gradients_through_quantised_weights_are_those_of_the_rounded_weights(llm_folder: Path) -> None:
    import bitsandbytes

    model, rounded = build(llm_folder, "nf4"), build(llm_folder)
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            whole = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            rounded.get_submodule(name).weight.data.copy_(whole)
    gradients = []
    for each in (model, rounded):
        add_lora(each, LORA)
        train(each)
        each.train()
        each(**batch()).loss.backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and any(".lora_A." in name for name in gradients[0])
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=1e-4 * float(gradient.abs().max()), rtol=0)


def test_adapters_of_a_quantised_model_are_merged_into_the_whole_weights(llm_folder: Path, tmp_path: Path) -> None:
    model = build(llm_folder, "nf4")
    add_lora(model, LORA)
    train(model)
    with pytest.raises(ValueError, match="14 layers with adapters are quantised .* load the model unquantised"):
        merge_lora(model)
    save_lora(model, tmp_path)
    whole = build(llm_folder)
    load_lora(whole, tmp_path)
    expected = logits(whole)
    merge_lora(whole)
    torch.testing.assert_close(logits(whole), expected, atol=1e-4, rtol=0)


def test_a_quantised_model_that_has_answered_gets_no_adapters(llm_folder: Path) -> None:
    model = build(llm_folder, "nf4")
    logits(model)
    with pytest.raises(ValueError, match="repacked for inference .* bitsandbytes computes wrong gradients through it"):
        add_lora(model, LORA)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(), "lora.rank=0 is too small for adapters; give at least 1"),
        (LoraConfig(rank=2, target_modules=("q_prj",)), "no linear layers called q_prj; it has down_proj, gate_proj,"),
        (LoraConfig(rank=2, target_modules=()), r"no linear layers called \(none given\); it has down_proj"),
    ],
)
def test_impossible_adapters_are_refused(config: LoraConfig, message: str, llm_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        add_lora(build(llm_folder), config)


def test_a_model_takes_adapters_once_and_has_some_to_save_and_merge(llm_folder: Path, tmp_path: Path) -> None:
    model = build(llm_folder)
    for use in (merge_lora, lambda model: save_lora(model, tmp_path)):
        with pytest.raises(ValueError, match="the model has no adapters; add some"):
            use(model)
    add_lora(model, LORA)
    with pytest.raises(ValueError, match="the model has adapters already; merge them"):
        add_lora(model, LORA)


def test_saved_adapters_that_do_not_fit_are_listed(llm_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no adapters; expected adapter_config.json"):
        load_lora(build(llm_folder), tmp_path)
    model = build(llm_folder)
    add_lora(model, LORA)
    save_lora(model, tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    first, second, *_ = sorted(weights)
    weights["extra.lora_A.weight"] = weights.pop(first)
    weights[second] = torch.zeros(1, 1)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ValueError, match=f"Missing: {first}; unexpected: extra.lora_A.weight; of another shape: {second}"
    ):
        load_lora(build(llm_folder), tmp_path)
    stored = stored_model(save_whole(build(llm_folder), tmp_path / "base"))
    with pytest.raises(
        ValueError, match="do not fit these weights of the model: model.language_model.layers.0.*, extra.weight"
    ):
        merged_tensors(stored, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "cannot be merged tensor by tensor .*use_dora"),
        ({"bias": "all"}, "cannot be merged tensor by tensor .*bias 'all'"),
        ({"peft_type": "IA3"}, "cannot be merged tensor by tensor .*'IA3'"),
    ],
)
def test_other_adapters_than_plain_ones_are_not_merged(
    change: dict[str, Any], message: str, llm_folder: Path, tmp_path: Path
) -> None:
    model = build(llm_folder)
    add_lora(model, LORA)
    save_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        merged_tensors({}, tmp_path)


def test_rank_stabilised_adapters_are_merged_with_their_own_scale(llm_folder: Path, tmp_path: Path) -> None:
    model = build(llm_folder)
    stored = stored_model(save_whole(model, tmp_path / "base"))
    add_lora(model, LORA)
    train(model)
    save_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    other = build(llm_folder)
    load_lora(other, tmp_path)
    merge_lora(other)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    merged = merged_tensors(stored, tmp_path)[name].read()
    torch.testing.assert_close(merged, other.state_dict()[name], atol=1e-6, rtol=0)
    assert not torch.allclose(merged, stored[name].read())


def test_without_peft_the_message_says_what_to_install(llm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ImportError, match=r"LoRA needs the package peft; install it with `pip install 'layerfuse\[lora\]'"
    ):
        add_lora(build(llm_folder), LORA)
