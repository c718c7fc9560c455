"""Tiny checkpoints in the layouts of others, written without the code under test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from layerfuse.fusers.mmfuser import MMFuser
from layerfuse.testing import randomise_parameters
from tests.integrations.llava.tiny_parts import make_tokenizer

__all__ = [
    "FUSED_LAYERS",
    "logits_of",
    "published_config",
    "published_weights",
    "save_llava_hf",
    "save_published",
    "save_tower",
    "tiny_llava_hf",
    "tiny_vip_llava",
    "write_weights",
]

WIDTH, SIZE, PATCH = 32, 32, 8
FUSED_LAYERS = [-6, -5, -4, -3, -2]
_CLIP = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 2}


def tiny_llava_hf(
    *, vocabulary: int, image_token: int, tower: str = "clip", **text: Any
) -> LlavaForConditionalGeneration:
    """A LLaVA of transformers with random weights: 6 vision blocks, 2 text blocks."""
    torch.manual_seed(0)
    parts = _parts(vocabulary, image_token, tower, text)
    strategy = "default" if tower == "clip" else "full"
    model = LlavaForConditionalGeneration(LlavaConfig(**parts, vision_feature_select_strategy=strategy)).eval()
    _randomise(model)
    return model


def tiny_vip_llava(
    *, vocabulary: int, image_token: int, layers: Any = (-2, -3, -6, 2), tower: str = "clip", eps: float = 1e-3
) -> VipLlavaForConditionalGeneration:
    """A ViP-LLaVA of transformers with random weights, of the same sizes."""
    torch.manual_seed(0)
    parts = _parts(vocabulary, image_token, tower, {})
    config = VipLlavaConfig(**parts, vision_feature_layers=layers, projector_layernorm_eps=eps)
    model = VipLlavaForConditionalGeneration(config).eval()
    _randomise(model)
    return model


def _parts(vocabulary: int, image_token: int, tower: str, text: dict[str, Any]) -> dict[str, Any]:
    kind = CLIPVisionConfig if tower == "clip" else SiglipVisionConfig
    fields = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    return {
        "vision_config": kind(**_CLIP, image_size=SIZE, patch_size=PATCH, initializer_range=0.2),
        "text_config": LlamaConfig(vocab_size=vocabulary, hidden_size=WIDTH, **{**fields, "pad_token_id": 0, **text}),
        "image_token_index": image_token,
        "image_seq_length": (SIZE // PATCH) ** 2,
    }


def _randomise(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.2)


def save_llava_hf(
    model: LlavaForConditionalGeneration | VipLlavaForConditionalGeneration,
    folder: Path,
    *,
    keys: str = "saved",
    pad: bool = False,
) -> None:
    """Write it as transformers does (`saved`), as the files on the hub are (`hub`), or under today's names (`new`)."""
    model.save_pretrained(folder)
    if keys != "saved":
        weights = {_hub(name) if keys == "hub" else name: tensor for name, tensor in model.state_dict().items()}
        write_weights(weights, folder)
    tokenizer = make_tokenizer("llama")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).to_dict()
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | {"do_pad": pad}))


def _hub(name: str) -> str:
    name = name.replace("model.vision_tower.", "vision_tower.vision_model.", 1)
    name = name.replace("model.language_model.", "language_model.model.", 1)
    name = name.replace("model.multi_modal_projector.", "multi_modal_projector.", 1)
    return name.replace("lm_head.", "language_model.lm_head.", 1)


def published_weights(model: LlavaForConditionalGeneration, *, fused: bool, tower: bool) -> dict[str, torch.Tensor]:
    """The same weights under the names of the published code, with a random fuser if asked for."""
    weights = {}
    positions = {"linear_1": "1", "linear_2": "3"} if fused else {"linear_1": "0", "linear_2": "2"}
    for name, tensor in model.state_dict().items():
        part, _, rest = name.removeprefix("model.").partition(".")
        if part == "vision_tower" and tower:
            weights[f"model.vision_tower.vision_tower.vision_model.{rest}"] = tensor
        elif part == "multi_modal_projector":
            linear, _, kind = rest.partition(".")
            weights[f"model.mm_projector.{positions[linear]}.{kind}"] = tensor
        elif part in ("language_model", "lm_head"):
            weights[name.replace("model.language_model.", "model.")] = tensor
    if fused:
        fuser = randomise_parameters(MMFuser(WIDTH, len(FUSED_LAYERS)))
        scales = {"output_scale.scale": "gamma1", "self_scale.scale": "gamma2"}
        for name, tensor in fuser.state_dict().items():
            weights[f"model.mm_projector.0.{scales.get(name, name)}"] = tensor
    return weights


def published_config(model: LlavaForConditionalGeneration, *, fused: bool) -> dict[str, Any]:
    """What the published code writes beside them."""
    text = model.config.get_text_config()
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "image_aspect_ratio": "pad",
        "initializer_range": 0.2,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "mm_hidden_size": WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": FUSED_LAYERS if fused else -2,
        "mm_vision_tower": "tiny-clip",
        "model_type": "llava_llama",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_key_value_heads": text.num_key_value_heads,
        "pad_token_id": 0,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": None,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "transformers_version": "4.37.2",
        "use_mm_proj": True,
        "vocab_size": text.vocab_size,
    }


def save_tower(model: LlavaForConditionalGeneration, folder: Path) -> Path:
    """Write the vision model as a folder of its own."""
    tower = model.model.vision_tower
    tower.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def save_published(
    model: LlavaForConditionalGeneration,
    folder: Path,
    *,
    fused: bool = True,
    tower: bool = True,
    kind: str = "safetensors",
) -> dict[str, torch.Tensor]:
    """Write a published checkpoint, its vision model beside it as `tiny-clip`; returns its weights."""
    weights = published_weights(model, fused=fused, tower=tower)
    folder.mkdir(parents=True)
    write_weights(weights, folder, kind=kind)
    (folder / "config.json").write_text(json.dumps(published_config(model, fused=fused), indent=2))
    make_tokenizer("llama").save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"a sentencepiece model")
    (folder / "generation_config.json").write_text(json.dumps({"max_length": 77, "temperature": 0.9}))
    # The released checkpoints have one of these beside their shards.
    torch.save({"model.mm_projector.0.weight": torch.zeros(1)}, folder / "mm_projector.bin")
    save_tower(model, folder.parent / "tiny-clip")
    return weights


def write_weights(weights: dict[str, torch.Tensor], folder: Path, *, kind: str = "safetensors") -> None:
    """Write weights as safetensors, `bin`, or either in two shards with an index (`sharded safetensors`, …)."""
    sharded, _, suffix = kind.rpartition(" ")
    stem = {"safetensors": "model", "bin": "pytorch_model"}[suffix]
    names = sorted(weights)
    parts = [names[::2], names[1::2]] if sharded else [names]
    places = {}
    for number, part in enumerate(parts, start=1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}" if sharded else f"{stem}.{suffix}"
        chosen = {name: weights[name].contiguous() for name in part}
        if suffix == "bin":
            torch.save(chosen, folder / file)
        else:
            save_file(chosen, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    if sharded:
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def logits_of(model: Any, image_token: int) -> torch.Tensor:
    """Of a text with an image in it, without the column of the image token: our head forbids it."""
    ids = torch.tensor([[1, 5, *[image_token] * (SIZE // PATCH) ** 2, 7, 8, 9]])
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids, pixel_values=pixels).logits
    return torch.cat([logits[..., :image_token], logits[..., image_token + 1 :]], dim=-1)
