"""A run's model built on the meta device, from the real classes, and the numbers that estimates are made of.

Nothing is allocated and nothing downloaded: the language model's config comes from its folder, the hub's cache, or the
recipe's `llm_architecture`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from integrations.llava.config import StageConfig
from integrations.llava.modeling import (
    FusedLlavaForConditionalGeneration,
    ModelSource,
    blank_condition,
    count_parameters,
)
from layerfuse.errors import InputError

__all__ = ["Block", "ModelFacts", "build_on_meta", "linear_layers", "model_facts"]


@dataclass(frozen=True)
class Block:
    """One block of the language model, with gated MLP and rotary attention as Llama's.

    Attributes:
        hidden: width D.
        intermediate: width of the MLP.
        queries: heads times their width.
        keys: key-value heads times their width.
        heads: number of heads.
        trained: parameters that learn, LoRA adapters included.
        frozen: parameters that do not.
        adapters: (width read, width written, rank) of each LoRA adapter in the block.
    """

    hidden: int
    intermediate: int
    queries: int
    keys: int
    heads: int
    trained: int
    frozen: int
    adapters: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model as a stage trains it, from which estimates are made.

    Attributes:
        trained: part -> parameters that learn.
        frozen: part -> parameters that do not.
        tokens_per_image: positions an image takes up, at most.
        num_blocks: of the language model.
        block: any of them; they are alike.
        vocabulary: rows of the output layer.
        tail: parameters of final norm and output layer.
        matrices: trained parameters of linear layers, which autocast copies to the computing precision.
        quantized: frozen parameters that quantisation can store in fewer bits: the blocks' linear layers.
        connector_bytes: tensors that autograd keeps of an image up to the language model, and the image's tokens.
    """

    trained: Mapping[str, int]
    frozen: Mapping[str, int]
    tokens_per_image: int
    num_blocks: int
    block: Block
    vocabulary: int
    tail: int
    matrices: int
    quantized: int
    connector_bytes: int

    @property
    def num_trained(self) -> int:
        """Parameters that learn."""
        return sum(self.trained.values())

    @property
    def num_frozen(self) -> int:
        """Parameters that do not."""
        return sum(self.frozen.values())


def build_on_meta(source: ModelSource, stage: StageConfig) -> FusedLlavaForConditionalGeneration:
    """Build a model as a stage trains it, on the meta device: all in the stage's precision, not quantised.

    Raises:
        ValueError: if a name, layer or option is not possible, or nothing describes the language model.
    """
    model = source.on_meta(stage)
    return model.bfloat16() if stage.precision == "bf16" else model


def model_facts(model: FusedLlavaForConditionalGeneration) -> ModelFacts:
    """Read the facts from a model as `build_on_meta` gives it.

    Raises:
        ValueError: if the language model's blocks are not like Llama's.
    """
    counts = count_parameters(model)
    blocks, text = _blocks(model), model.config.text_config
    norm = getattr(model.model.language_model, "norm", None)
    tail = [*model.lm_head.parameters(), *(norm.parameters() if isinstance(norm, nn.Module) else ())]
    return ModelFacts(
        trained={part: count["trainable"] for part, count in counts.items()},
        frozen={part: count["frozen"] for part, count in counts.items()},
        tokens_per_image=model.config.layout.num_tokens(model.config.layout.largest_size),
        num_blocks=len(blocks),
        block=_block(blocks[0], text),
        vocabulary=model.lm_head.out_features,
        tail=sum(parameter.numel() for parameter in tail),
        matrices=sum(layer.weight.numel() for _, layer in linear_layers(model) if layer.weight.requires_grad),
        quantized=sum(
            layer.weight.numel()
            for name, layer in linear_layers(blocks)
            if "lora_" not in name and not layer.weight.requires_grad
        ),
        connector_bytes=_connector_bytes(model),
    )


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Iterate over the linear layers inside a module, with their names."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear))


def _blocks(model: FusedLlavaForConditionalGeneration) -> nn.ModuleList:
    blocks = getattr(model.model.language_model, "layers", None)
    text: Any = model.config.text_config
    if not isinstance(blocks, nn.ModuleList) or not hasattr(text, "intermediate_size"):
        raise InputError(
            f"a dry run knows language models of blocks like Llama's (Vicuna, Mistral, Qwen2, …), but {text.model_type}"
            " has no list 'layers' or no 'intermediate_size'; train without it, or measure a few steps (max_steps)."
        )
    return blocks


def _block(block: nn.Module, text: Any) -> Block:
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    linear = dict(linear_layers(block))
    return Block(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        queries=text.num_attention_heads * head_width,
        keys=keys * head_width,
        heads=text.num_attention_heads,
        trained=sum(p.numel() for p in block.parameters() if p.requires_grad),
        frozen=sum(p.numel() for p in block.parameters() if not p.requires_grad),
        adapters=tuple(
            (first.in_features, linear[name.replace("lora_A", "lora_B")].out_features, first.out_features)
            for name, first in linear.items()
            if "lora_A" in name
        ),
    )


def _connector_bytes(model: FusedLlavaForConditionalGeneration) -> int:
    """Run one image, of most tiles, through the meta device, up to the language model; add up what autograd keeps."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    backbone, layout = model.model.vision_tower.backbone, model.config.layout
    size = layout.largest_size or backbone.image_size
    pixels = torch.empty(layout.num_tiles(size), backbone.in_channels, *backbone.image_size, device="meta")
    blank = blank_condition(model.model.fuser, 1, pixels)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model.model.get_image_features(pixels, image_sizes=torch.tensor([size]), condition=blank)
    for tokens in (features.pooler_output, *(getattr(features, "deepstack_features", None) or ())):
        for tensor in tokens or ():
            keep(tensor)
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())
