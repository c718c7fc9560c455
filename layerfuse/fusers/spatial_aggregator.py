"""The Spatial Vision Aggregator (SVA) of Cambrian-1 (arXiv:2406.16860), its part in front of the language model.

Every cell of the output grid holds one query, which reads the window of tokens below its cell in each map. With x_l the
maps, LN layer norms, W linear layers without bias, and MLP two of them around a GELU:

    f_l = LN(Linear(GELU(Linear(x_l))))              g = mean of f_1's tokens
    p   = W_in [q | W_g g]
    q  <- q + MLP(LN(p + read(p, windows of f_1 ... f_L)))      ``depth`` times, from one learned q for all cells

``read`` is one attention over all windows together ("joint"), or one per map, summed with the softmax of
MLP([q | W_g g]) over the maps ("separate"); a window of one token needs no attention there, and passes an MLP instead.
Windows of several tokens get learned positions. The repository (cambrian-mllm/cambrian, vision_sampler.py) also masks
the padding of images and reads again inside the language model; neither is done here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps, Grid, as_grid, resample_tokens
from layerfuse.fusers.base import FUSERS, Fuser
from layerfuse.ops import check_heads

__all__ = ["SpatialAggregator"]

_CONTEXTS = ("mean", "none")
_MIXINGS = ("joint", "separate")
# Corner cells do not stay on corner cells, as they do in `FeatureMaps.resample`: Cambrian's encoders have it so.
_RESAMPLING = {"mode": "bilinear", "align_corners": False}


class RandomTable(nn.Module):
    """Learned vectors, normally distributed at the start; a module, so that it resets itself.

    Args:
        rows: number of vectors.
        channels: C.
        std: standard deviation at the start.
    """

    def __init__(self, rows: int, channels: int, *, std: float = 1.0) -> None:
        super().__init__()
        self.std = std
        self.table = nn.Parameter(torch.empty(rows, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the vectors anew."""
        nn.init.normal_(self.table, std=self.std)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Add the vectors to (..., rows, C) tokens."""
        return tokens + self.table


class WindowAttention(nn.Module):
    """Attention of one query per cell over the windows of one or several maps: layer norm before q, k and v, no biases.

    Args:
        channels: C.
        num_heads: M.
        num_maps: maps with keys and values of their own.
    """

    def __init__(self, channels: int, num_heads: int, num_maps: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = _normed_linear(channels)
        self.keys = nn.ModuleList(_normed_linear(channels) for _ in range(num_maps))
        self.values = nn.ModuleList(_normed_linear(channels) for _ in range(num_maps))
        self.out = nn.Linear(channels, channels, bias=False)

    def forward(self, queries: torch.Tensor, windows: Sequence[torch.Tensor]) -> torch.Tensor:
        """Read the windows.

        Args:
            queries: (B, N, C).
            windows: (B, N, tokens, C) per map.

        Returns:
            (B, N, C).
        """
        keys = torch.cat([project(window) for project, window in zip(self.keys, windows, strict=True)], dim=2)
        values = torch.cat([project(window) for project, window in zip(self.values, windows, strict=True)], dim=2)
        heads = (self.num_heads, keys.shape[-1] // self.num_heads)
        query = self.query(queries).unflatten(-1, heads).unsqueeze(-2)  # (B, N, M, 1, C/M)
        keys = keys.unflatten(-1, heads).permute(0, 1, 3, 4, 2)  # (B, N, M, C/M, S)
        values = values.unflatten(-1, heads).transpose(2, 3)  # (B, N, M, S, C/M)
        weights = (query @ keys * heads[1] ** -0.5).softmax(-1)
        attended: torch.Tensor = self.out((weights @ values).flatten(2))
        return attended


class SeparateReading(nn.Module):
    """One reading per map, summed with weights that depend on query and context.

    Args:
        channels: C.
        num_heads: M.
        windows: edge of the window in each map.
        gate_channels: width of query and context side by side.
    """

    def __init__(self, channels: int, num_heads: int, windows: Sequence[int], gate_channels: int) -> None:
        super().__init__()
        self.readers = nn.ModuleList(
            WindowAttention(channels, num_heads, 1) if window > 1 else _mlp(channels, channels) for window in windows
        )
        self.gate = _mlp(gate_channels, channels, len(windows)) if len(windows) > 1 else None

    def forward(self, queries: torch.Tensor, windows: Sequence[torch.Tensor], gate: torch.Tensor) -> torch.Tensor:
        """Read the windows.

        Args:
            queries: (B, N, C).
            windows: (B, N, tokens, C) per map.
            gate: query and context side by side, (B, N, ``gate_channels``).

        Returns:
            (B, N, C).
        """
        readings = [
            reader(queries, [window]) if isinstance(reader, WindowAttention) else reader(window[:, :, 0])
            for reader, window in zip(self.readers, windows, strict=True)
        ]
        if self.gate is None:
            return readings[0]
        weights = self.gate(gate).softmax(-1)
        return (weights.unsqueeze(-2) @ torch.stack(readings, dim=2)).squeeze(-2)


class AggregatorLayer(nn.Module):
    """One round of reading.

    Args:
        channels: C.
        num_heads: M.
        windows: edge of the window in each map.
        context: whether the queries see a context.
        mixing: ``"joint"`` or ``"separate"``.
    """

    def __init__(self, channels: int, num_heads: int, windows: Sequence[int], *, context: bool, mixing: str) -> None:
        super().__init__()
        seen = 2 * channels if context else channels
        self.context_proj = nn.Linear(channels, channels, bias=False) if context else None
        self.in_proj = nn.Linear(seen, channels, bias=False)
        self.positions = nn.ModuleList(
            RandomTable(window**2, channels) if window > 1 else nn.Identity() for window in windows
        )
        self.reading: WindowAttention | SeparateReading = (
            WindowAttention(channels, num_heads, len(windows))
            if mixing == "joint"
            else SeparateReading(channels, num_heads, windows, seen)
        )
        self.norm = nn.LayerNorm(channels)
        self.out_mlp = _mlp(channels, channels)

    def forward(
        self, queries: torch.Tensor, windows: Sequence[torch.Tensor], context: torch.Tensor | None
    ) -> torch.Tensor:
        """Let the queries read the windows.

        Args:
            queries: (B, N, C).
            windows: (B, N, tokens, C) per map.
            context: (B, 1, C), if the layer was built for one.

        Returns:
            (B, N, C).
        """
        seen = queries
        if self.context_proj is not None and context is not None:
            seen = torch.cat([queries, self.context_proj(context).expand_as(queries)], dim=-1)
        inner = self.in_proj(seen)
        placed = [add(window) for add, window in zip(self.positions, windows, strict=True)]
        if isinstance(self.reading, SeparateReading):
            read = self.reading(inner, placed, seen)
        else:
            read = self.reading(inner, placed)
        updated: torch.Tensor = queries + self.out_mlp(self.norm(inner + read))
        return updated


@FUSERS.register("spatial_aggregator")
class SpatialAggregator(Fuser):
    """One learned query per output cell reads the window below it in every map. Widths and grids of maps may differ.

    A map whose grid is not the output grid times its window is first resampled to that, bilinearly in float32 at least
    (align_corners off), as Cambrian's encoders do, where the name of each says the grid that its map is brought to.
    Here ``grid`` and ``windows`` say it: a map twice as fine as the output is read in windows with a window of 2, and
    resampled with a window of 1. Where all windows have one token, this is attention over depth, cell by cell.

    Args:
        in_channels: C of every map, or one number per map.
        num_layers: number of maps L, of one or several backbones.
        grid: (H, W) of the output, in cells; if left out, that of the last map divided by its window, rounded down.
        windows: edge of the window in cells of the map, one number for all maps or one per map.
        depth: number of rounds of reading.
        context: what all queries of an image see: ``"mean"``, the mean token of one map; or ``"none"``.
        context_index: position of that map among the L; negative counts from the end.
        mixing: ``"joint"``, one attention over the windows of all maps; or ``"separate"``, one per map.
        hidden_channels: C of queries and output; if left out, the width of the last map.
        num_heads: M; must divide ``hidden_channels``.

    Raises:
        ValueError: if a name is unknown, a number below 1, ``grid`` no pair, ``windows`` not one per map, a map not
            there, or the heads do not divide the channels.
    """

    equal_grids = False

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_layers: int,
        *,
        grid: Sequence[int] | None = None,
        windows: int | Sequence[int] = 1,
        depth: int = 3,
        context: str = "mean",
        context_index: int = 0,
        mixing: str = "joint",
        hidden_channels: int | None = None,
        num_heads: int = 16,
    ) -> None:
        super().__init__(in_channels, num_layers, out_channels=hidden_channels)
        channels = self.out_channels
        self._check_choice("context", context, _CONTEXTS)
        self._check_choice("mixing", mixing, _MIXINGS)
        self._check_count("depth", depth)
        self._check_count("hidden_channels", channels)
        check_heads(channels, num_heads)
        self._check_index("context_index", context_index)
        self.windows = _checked_windows(windows, num_layers)
        self.grid = None if grid is None else as_grid(grid, "grid of fuser 'spatial_aggregator'")
        self.context_index = context_index if context == "mean" else None
        self.projections = nn.ModuleList(_map_projection(width, channels) for width in self.in_channels)
        self.query = RandomTable(1, channels, std=channels**-0.5)
        self.layers = nn.ModuleList(
            AggregatorLayer(channels, num_heads, self.windows, context=context == "mean", mixing=mixing)
            for _ in range(depth)
        )

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        """Return what the queries read: (B, N, C) over the output grid."""
        grid = self.out_grid(features.grids)
        maps = [
            project(resample_tokens(tokens, given, read, _RESAMPLING))
            for project, tokens, given, read in zip(
                self.projections, features.maps, features.grids, self._read_grids(grid), strict=True
            )
        ]
        windows = [_windows(tokens, grid, window) for tokens, window in zip(maps, self.windows, strict=True)]
        context = None if self.context_index is None else maps[self.context_index].mean(1, keepdim=True)
        queries: torch.Tensor = self.query(windows[0].new_zeros(features.batch_size, grid[0] * grid[1], 1))
        for layer in self.layers:
            queries = layer(queries, windows, context)
        return queries

    def out_grid(self, grids: Sequence[Grid]) -> Grid:
        """Return the grid of the queries."""
        if self.grid is not None:
            return self.grid
        (height, width), window = grids[-1], self.windows[-1]
        return max(height // window, 1), max(width // window, 1)

    def extra_flops(self, grids: Sequence[Grid]) -> int:
        """Count the resampling of maps: four multiply-adds for each number that is read."""
        total = 0
        read_grids = self._read_grids(self.out_grid(grids))
        for given, read, channels in zip(grids, read_grids, self.in_channels, strict=True):
            total += 8 * read[0] * read[1] * channels if given != read else 0
        return total

    def _read_grids(self, grid: Grid) -> list[Grid]:
        """Return the grid to which each map is brought."""
        return [(grid[0] * window, grid[1] * window) for window in self.windows]


def _mlp(in_channels: int, channels: int, out_channels: int | None = None) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_channels, channels, bias=False),
        nn.GELU(),
        nn.Linear(channels, channels if out_channels is None else out_channels, bias=False),
    )


def _normed_linear(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels, bias=False))


def _map_projection(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(in_channels, channels), nn.GELU(), nn.Linear(channels, channels), nn.LayerNorm(channels)
    )


def _checked_windows(windows: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    listed = (windows,) * num_layers if isinstance(windows, int) else tuple(windows)
    if len(listed) != num_layers or min(listed) < 1:
        raise InputError(
            f"windows is {windows!r} for {num_layers} maps; give one edge of at least 1 for all maps, or one per map."
        )
    return listed


def _windows(tokens: torch.Tensor, grid: Grid, window: int) -> torch.Tensor:
    """Cut (B, N, C) tokens into one window per cell of a grid: (B, cells, window * window, C), row-major."""
    cut = tokens.unflatten(1, (grid[0], window, grid[1], window)).transpose(2, 3)
    return cut.flatten(3, 4).flatten(1, 2)
