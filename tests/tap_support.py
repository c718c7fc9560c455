"""Small models whose layers are tapped, and a count of the tensors that are still alive."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["Block", "Chain", "tensors_alive", "tokens"]


class Block(nn.Module):
    """A residual block over (B, N, C)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x))


class Chain(nn.Module):
    """The shape of a ViT: embedding, blocks, norm. ``run`` calls the blocks, if not one after another."""

    def __init__(
        self,
        blocks: nn.ModuleList | nn.Sequential | None = None,
        *,
        run: Callable[[Chain, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4)) if blocks is None else blocks
        self.norm = nn.LayerNorm(4)
        self.run = run

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        if self.run is not None:
            return self.norm(self.run(self, x))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def tokens(seed: int = 1, *, batch_size: int = 2) -> torch.Tensor:
    """Make (B, 7, 3) random inputs of a `Chain`."""
    return torch.randn(batch_size, 7, 3, generator=torch.Generator().manual_seed(seed))


def tensors_alive(shape: tuple[int, ...]) -> int:
    """Count the tensors of a shape that anything still refers to."""
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) and tuple(found.shape) == shape for found in gc.get_objects())
