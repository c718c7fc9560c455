"""One learned factor per channel, zero at the start: what it scales joins in only as training finds a use for it."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["ChannelScale"]


class ChannelScale(nn.Module):
    """A layer of one learned factor per channel, zero at the start.

    A module of its own, and no name with gamma or beta: transformers renames such parameters while it loads, and the
    weights are then lost (huggingface/transformers#29554).

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the scales to zero."""
        nn.init.zeros_(self.scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scale the channels of (B, N, C) tokens."""
        return tokens * self.scale
