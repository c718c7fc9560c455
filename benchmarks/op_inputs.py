"""Inputs of deformable attention at MMFuser's size, the float64 oracle, and the check that stands before any timing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.measure import Call, relative_error
from benchmarks.peers import Attend
from layerfuse.ops import deformable_attention

__all__ = ["Inputs", "backward", "check", "draw_inputs", "forward"]

# Points keep this distance from lines between cells, in cells; float32 places them to about 1e-5.
_FROM_LINE = 1e-3


@dataclass(frozen=True)
class Inputs:
    """Leaves that collect gradients.

    Attributes:
        value: (B, S, M, C/M), in the dtype that is measured.
        locations: (B, Q, M, L, K, 2), float32.
        weights: (B, Q, M, L, K), float32.
        grids: L times the queries' grid (H, W).
    """

    value: torch.Tensor
    locations: torch.Tensor
    weights: torch.Tensor
    grids: tuple[tuple[int, int], ...]

    @property
    def leaves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The three tensors."""
        return self.value, self.locations, self.weights


def draw_inputs(
    batch_size: int,
    edge: int,
    *,
    levels: int = 4,
    num_heads: int = 16,
    head_channels: int = 64,
    num_points: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Draw inputs as at the start of training: points a few cells around each query's own, some outside the map.

    None lies so near the line between two cells that float32 could see it on the other side, where the gradient jumps.
    ``edge``: of the square grid of queries and of each level.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    num_queries = edge * edge
    shape = (batch_size, num_queries, num_heads, levels, num_points)
    value = normal(batch_size, levels * num_queries, num_heads, head_channels).to(dtype)
    cells = (torch.arange(edge, device=device) + 0.5) / edge
    rows, columns = torch.meshgrid(cells, cells, indexing="ij")
    centre = torch.stack((columns, rows), dim=-1).view(1, num_queries, 1, 1, 1, 2)
    places = (centre + normal(*shape, 2) * 2.5 / edge) * edge - 0.5
    corner = places.floor()
    locations = (corner + (places - corner).clamp(_FROM_LINE, 1 - _FROM_LINE) + 0.5) / edge
    weights = normal(*shape).flatten(3).softmax(-1).view(shape)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    return Inputs(*leaves, grids=((edge, edge),) * levels)


def forward(attend: Attend, inputs: Inputs) -> Call:
    """Return a call of the forward pass alone, which keeps nothing for a backward pass."""
    leaves = tuple(leaf.detach() for leaf in inputs.leaves)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return attend(*leaves)

    return call


def backward(attend: Attend, inputs: Inputs) -> Call:
    """Return a call of forward and backward pass, with gradients to all three inputs."""
    upstream = torch.ones_like(attend(*inputs.leaves))

    def call() -> object:
        return torch.autograd.grad(attend(*inputs.leaves), inputs.leaves, upstream)

    return call


def check(candidates: Mapping[str, Attend], inputs: Inputs) -> dict[str, float]:
    """Return the largest relative error of each candidate against float64, of the output and the three gradients.

    Only the first image is compared: images do not touch one another, and float64 takes its time.
    """
    first = tuple(leaf[:1].detach() for leaf in inputs.leaves)
    exact = _results(
        lambda *leaves: deformable_attention(leaves[0], inputs.grids, *leaves[1:], implementation="reference"),
        tuple(leaf.double() for leaf in first),
    )
    errors = {}
    for label, attend in candidates.items():
        pairs = zip(_results(attend, first), exact, strict=True)
        errors[label] = max(relative_error(ours, theirs) for ours, theirs in pairs)
    return errors


def _results(attend: Attend, leaves: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    leaves = tuple(leaf.requires_grad_() for leaf in leaves)
    output = attend(*leaves)  # type: ignore[arg-type]
    upstream = torch.linspace(-1, 1, output.numel(), device=output.device, dtype=torch.float64).view_as(output)
    return output, *torch.autograd.grad(output, leaves, upstream.to(output.dtype))
