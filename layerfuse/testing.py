"""Tiny random inputs and models, for layerfuse's tests and for those of projects that use it.

Everything is offline, on the CPU, and the same for the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from layerfuse.backbones import MODULES, Backbone, create_backbone
from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.layers import LayerChoice
from layerfuse.registry import unknown_name_message

__all__ = ["TinyViT", "random_features", "random_images", "randomise_parameters", "tiny_backbone"]


def random_images(
    batch_size: int = 2, *, size: int | tuple[int, int] = 32, dtype: torch.dtype = torch.float32, seed: int = 0
) -> torch.Tensor:
    """Return normally distributed images (B, 3, height, width), as a backbone takes them; equal for equal seeds.

    ``size`` is one edge, or (height, width), in pixels.
    """
    height, width = (size, size) if isinstance(size, int) else size
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, 3, height, width, generator=generator).to(dtype)


def random_features(
    channels: int | Sequence[int] = 32,
    *,
    num_layers: int | None = None,
    grids: Grid | Sequence[Grid] = (4, 4),
    batch_size: int = 2,
    num_prefix_tokens: int = 0,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    seed: int = 0,
) -> FeatureMaps:
    """Return normally distributed feature maps of layers 1, 2, … L, as a fuser takes them; equal for equal seeds.

    Args:
        channels: C of every map, or one number per map.
        num_layers: L; if left out, as many as ``channels`` or ``grids`` has entries, else 5.
        grids: (H, W) of every map in patches, or one pair per map.
        batch_size: B.
        num_prefix_tokens: P; with 0 the result has no prefix tensors.
        dtype: of the maps.
        requires_grad: whether the maps are leaves that collect gradients.
        seed: of the random numbers.

    Raises:
        ValueError: if ``num_layers``, ``channels`` and ``grids`` speak of different numbers of maps.
    """
    widths = None if isinstance(channels, int) else tuple(channels)
    grid_list = None if isinstance(grids[0], int) else tuple(cast("Sequence[Grid]", grids))
    lengths = {len(entries) for entries in (widths, grid_list) if entries is not None}
    if num_layers is not None:
        lengths.add(num_layers)
    if len(lengths) > 1:
        raise InputError(
            f"num_layers={num_layers}, channels={channels} and grids={grids} name different numbers of maps; "
            "give one number or one pair for all maps, or as many as there are maps."
        )
    count = lengths.pop() if lengths else 5
    all_widths = widths or (cast(int, channels),) * count
    all_grids = grid_list or (cast(Grid, grids),) * count
    generator = torch.Generator().manual_seed(seed)

    def draw(num_tokens: int, width: int) -> torch.Tensor:
        tokens = torch.randn(batch_size, num_tokens, width, generator=generator).to(dtype)
        return tokens.requires_grad_(requires_grad)

    maps = [draw(grid[0] * grid[1], width) for grid, width in zip(all_grids, all_widths, strict=True)]
    prefix = [draw(num_prefix_tokens, width) for width in all_widths] if num_prefix_tokens else []
    return FeatureMaps(maps=tuple(maps), layers=tuple(range(1, count + 1)), grids=all_grids, prefix=tuple(prefix))


def randomise_parameters(module: nn.Module, *, std: float = 0.2, seed: int = 0) -> nn.Module:
    """Overwrite every parameter with random numbers, so that no special start (zeros, identities) hides a fault.

    The module is changed in place and returned; equal seeds give equal numbers. ``std`` is their standard deviation;
    one-dimensional scales named ``weight`` (norms) get 1 added.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            if parameter.ndim == 1 and name.rpartition(".")[2] == "weight":
                noise += 1
            parameter.copy_(noise)
    return module


@MODULES.register("tiny-vit")
class TinyViT(nn.Module):
    """The least Vision Transformer in plain torch, for trying the ``module`` family; sizes are edges, in pixels."""

    def __init__(
        self,
        *,
        embed_dim: int = 32,
        depth: int = 3,
        num_heads: int = 2,
        image_size: int = 32,
        patch_size: int = 8,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (image_size // patch_size) ** 2, embed_dim))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                embed_dim, num_heads, 2 * embed_dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = nn.Linear(embed_dim, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return 10 class scores of every token of (B, 3, height, width) images: (B, 1 + N, 10)."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(images.shape[0], -1, -1), patches], dim=1) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        scores: torch.Tensor = self.head(self.norm(tokens))
        return scores


def tiny_backbone(
    family: str = "timm",
    *,
    layers: LayerChoice = (1, 2, -1),
    num_blocks: int = 3,
    embed_dim: int = 32,
    num_heads: int = 2,
    image_size: int = 32,
    patch_size: int = 8,
    seed: int = 0,
) -> Backbone:
    """Build a CLIP-like backbone with one class token and random weights, equal for equal seeds, in evaluation mode.

    Args:
        family: ``"timm"``, ``"open_clip"``, ``"transformers"`` or ``"module"``.
        layers: as in `layerfuse.resolve_layers`, in the order wanted.
        num_blocks: before the backbone is cut.
        embed_dim: C.
        num_heads: of each block; divides ``embed_dim``.
        image_size: edge, in pixels.
        patch_size: edge, in pixels.
        seed: of the weights.

    Raises:
        ValueError: if there is no tiny model of that family.
    """
    sizes = {"image_size": image_size, "patch_size": patch_size}
    vit = {"embed_dim": embed_dim, "depth": num_blocks, "num_heads": num_heads}
    clip = {"hidden_size": embed_dim, "num_hidden_layers": num_blocks, "num_attention_heads": num_heads}
    tower = {"width": embed_dim, "layers": num_blocks, "head_width": embed_dim // num_heads}
    facts = {"embed_dim": embed_dim, "num_prefix_tokens": 1, "blocks": "blocks", "tail": ["norm", "head"]}
    models: dict[str, tuple[str, dict[str, Any]]] = {
        "timm": (
            "vit_base_patch16_clip_quickgelu_224.openai",
            {**vit, "img_size": image_size, "patch_size": patch_size},
        ),
        "open_clip": ("ViT-B-16-quickgelu:openai", {**tower, **sizes}),
        "transformers": ("clip_vision_model", {**clip, "intermediate_size": 2 * embed_dim, **sizes}),
        "module": ("tiny-vit", {**facts, **sizes, "arguments": {**vit, **sizes}}),
    }
    if family not in models:
        raise InputError(unknown_name_message("tiny backbone of family", family, models))
    name, options = models[family]
    backbone = create_backbone(f"{family}:{name}", layers=layers, pretrained=False, options=options)
    randomise_parameters(backbone, std=0.1, seed=seed)
    return backbone
