"""Floating point operations of one sample, by part.

A linear layer of w weights costs 2 w per token forward; backward 2 w more for the gradient of its input, and 2 w for
that of its weights if they learn. Attention costs 4 T^2 Q per block forward (T tokens, Q width of all heads; causal
masking saves nothing here) and twice that backward. Norms, softmax and element-wise work are left out. So

- the backbone, frozen, runs forward only, on its patches and prefix tokens, up to the deepest layer that is tapped;
- fuser and projector, with it the mergers of layer injection, run forward and, if they learn, backward at twice the
  cost;
- a language model that learns costs 1 + 2; a frozen one behind a projector that learns 1 + 1: gradients pass through
  it; with checkpointing its blocks run forward once more, but for the last linear layer of each;
- its head runs on all positions, or, where cross-entropy goes by chunks, on those with a label, forward twice.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from integrations.llava.modeling import FusedLlavaForConditionalGeneration, LayerInjection, Merger, learns
from layerfuse.backbones import AnyBackbone, Backbone

from .facts import ModelFacts, linear_layers
from .gpus import Gpu

__all__ = ["PartFlops", "hours", "sample_flops"]


class PartFlops(NamedTuple):
    """Floating point operations of a part: forward, forward again through checkpointing, and backward."""

    forward: float = 0.0
    recompute: float = 0.0
    backward: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self)


def sample_flops(
    model: FusedLlavaForConditionalGeneration,
    facts: ModelFacts,
    *,
    images: float,
    tokens: float,
    checkpointing: bool,
    labelled: float | None = None,
) -> dict[str, PartFlops]:
    """Count the operations of one sample in training.

    Args:
        model: also on the meta device; each parameter trained or frozen, as in that stage.
        facts: of the same model.
        images: per sample; of images that are cut, their tiles.
        tokens: T of the sample, images included.
        checkpointing: whether the language model's blocks are computed again in the backward pass.
        labelled: positions whose logits are computed, by chunks; None if those of all are, once.

    Returns:
        Part -> operations.
    """
    inner = model.model
    backbone, fuser, projector = inner.vision_tower.backbone, inner.fuser, inner.multi_modal_projector
    fused = fuser.cost(inner.fuser_grids)
    tower = sum(map(_backbone_forward, backbone.members))
    first, second = (
        2.0 * fused.num_tokens * layer.weight.numel() for layer in (projector.linear_1, projector.linear_2)
    )
    # Gradients go as far back as something learns.
    past_backbone = learns(backbone)
    past_fuser = past_backbone or learns(fuser)
    past_projector = past_fuser or learns(projector)
    projector_backward = (first + second) * learns(projector) + second * past_projector + first * past_fuser
    merged, merged_backward = _mergers(inner.injection, backbone, past_backbone)
    return {
        "backbone": PartFlops(images * tower, backward=images * 2 * tower * past_backbone),
        "fuser": PartFlops(images * fused.flops, backward=images * 2 * fused.flops * past_fuser),
        "projector": PartFlops(
            images * (first + second + merged), backward=images * (projector_backward + merged_backward)
        ),
        "llm": _language_model(model, facts, tokens, past_projector, checkpointing, labelled),
    }


def hours(flops: float, gpu: Gpu, *, num_gpus: int, utilization: float) -> float:
    """Hours that operations take at a share of the GPUs' peak speed."""
    return flops / (gpu.tflops * 1e12 * num_gpus * utilization) / 3600


def _backbone_forward(backbone: Backbone) -> float:
    rows, columns = backbone.grid(*backbone.image_size)
    patches = rows * columns
    tokens = patches + backbone.num_prefix_tokens
    embedding = sum(layer.weight.numel() for layer in backbone.modules() if isinstance(layer, nn.Conv2d))
    attention = 4.0 * tokens**2 * backbone.embed_dim * max(backbone.layers)
    return 2.0 * tokens * _weights(backbone) + 2.0 * patches * embedding + attention


def _mergers(injection: LayerInjection | None, backbone: AnyBackbone, past_backbone: bool) -> tuple[float, float]:
    """Count an image's operations in the mergers of layer injection, forward and backward; they learn as one."""
    forward = backward = 0.0
    read = () if injection is None else zip(injection.mergers, injection.grids(backbone), strict=True)
    for merger, grid in read:
        assert isinstance(merger, Merger)
        gather, tokens, learned = merger.gather_flops(grid), merger.num_tokens(grid), learns(merger)
        first, second = (2.0 * tokens * layer.weight.numel() for layer in (merger.linear_1, merger.linear_2))
        forward += gather + first + second
        # Gradients go back to what learns before the linear layers, a fuser or a norm.
        past_linear = past_backbone or any(
            parameter.requires_grad for name, parameter in merger.named_parameters() if not name.startswith("linear_")
        )
        backward += (first + second) * learned + second * (learned or past_backbone)
        backward += (first + 2 * gather) * past_linear
    return forward, backward


def _language_model(
    model: FusedLlavaForConditionalGeneration,
    facts: ModelFacts,
    tokens: float,
    gradient: bool,
    checkpointing: bool,
    labelled: float | None,
) -> PartFlops:
    inner, head = model.model.language_model, model.lm_head
    attention = 4.0 * tokens**2 * facts.block.queries * facts.num_blocks
    rows = tokens if labelled is None else labelled
    logits = 2.0 * rows * _weights(head)
    forward = 2.0 * tokens * _weights(inner) + logits + attention
    if not gradient and not _weights(inner, trained=True):
        return PartFlops(forward)
    again = 0.0 if labelled is None else logits
    if checkpointing:
        # Torch stops repeating a block when it has what backward needs: before the last linear layer.
        last = sum(list(linear_layers(block))[-1][1].weight.numel() for block in inner.layers)
        again += 2.0 * tokens * (_weights(inner) - last) + attention
    learned = 2.0 * tokens * _weights(inner, trained=True) + 2.0 * rows * _weights(head, trained=True)
    return PartFlops(forward, again, forward + attention + learned)


def _weights(module: nn.Module, *, trained: bool = False) -> int:
    """Count the weights of linear layers: all, or those that learn."""
    weights = [layer.weight for _, layer in linear_layers(module)]
    return sum(weight.numel() for weight in weights if weight.requires_grad or not trained)
