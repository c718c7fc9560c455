"""Every fuser in every form that `test_contract.py` tries, and what it must know of each."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import FUSERS, Fuser


@FUSERS.register("test_gated")
class Gated(Fuser):
    """A fuser as a user would write it: the last map plus a bottleneck of each other one."""

    equal_channels = True

    def __init__(self, in_channels: int | Sequence[int], num_layers: int, *, bottleneck: int = 3) -> None:
        super().__init__(in_channels, num_layers)
        width = self.in_channels[0]
        self.down = nn.ModuleList(nn.Linear(width, bottleneck) for _ in range(num_layers))
        self.up = nn.Linear(bottleneck, width)

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        mixed = torch.stack([down(x) for down, x in zip(self.down, features, strict=True)]).sum(0)
        return features.maps[-1] + self.up(mixed)


# Every fuser, in every form that computes something else. A new fuser gets one entry, or is tested with its defaults.
FORMS: dict[str, list[dict[str, Any]]] = {
    "attention_pool": [{"num_heads": 2}, {"num_heads": 4, "window": 3, "out_channels": 12}],
    "select": [{}, {"index": 0}],
    "cross_attention": [{"num_heads": 2}, {"num_heads": 4, "query_index": 1}],
    "depth_attention": [
        {"num_heads": 2},
        {"num_heads": 4, "logits": "own"},
        {"num_heads": 1, "start": "query_layer", "query_index": 1},
        {"num_heads": 2, "logits": "own", "start": "query_layer"},
    ],
    "concat": [
        {},
        {"norm": "layer"},
        {"out_channels": 6},
        {"norm": "layer", "out_channels": 6},
        {"order": "interleaved", "norm": "layer"},
        {"resize": "bilinear"},
        {"resize": "bicubic", "grid": (2, 3)},
        {"resize": "nearest", "grid": (3, 2), "out_channels": 6},
    ],
    "dense_connector": [
        {},
        {"groups": 1, "query_in_groups": False},
        {"mode": "sci", "query_index": 0},
        {"mode": "sti"},
        {"mode": "sti", "pool": (2, 1)},
    ],
    "mmfuser": [
        {"num_heads": 2},
        {"num_heads": 1, "num_points": 2, "query_index": 0},
        {"num_heads": 4, "num_points": 3, "query_index": 1, "implementation": "reference"},
    ],
    "scalar_mix": [{}, {"normalise": "none"}, {"normalise": "none", "start": "query_layer", "query_index": 0}],
    "spatial_aggregator": [
        {"num_heads": 2},
        {"num_heads": 1, "windows": 2, "depth": 1, "context_index": -1, "hidden_channels": 6},
        {"num_heads": 2, "grid": [2, 3], "depth": 2, "context": "none", "mixing": "separate"},
        {"num_heads": 2, "windows": 2, "depth": 1, "mixing": "separate"},
    ],
    "test_gated": [{}, {"bottleneck": 5}],
    "text_gated": [
        {"condition_channels": 6, "groups": 2, "num_heads": 2},
        {"condition_channels": 3, "groups": 2, "num_heads": 3, "num_attention_layers": 1, "hidden_channels": 12},
    ],
    "token_concat": [{}, {"query_index": 0}],
}
ALL_FORMS = [(name, options) for name in FUSERS.names() for options in FORMS.get(name, [{}])]
# Forms that take one width, of fusers that otherwise take several.
ONE_WIDTH = [("concat", "order", "interleaved")]
IDS = [f"{name}-{json.dumps(options)}" for name, options in ALL_FORMS]
# Registered while `test_contract.py` runs only: tests of other files see the registry as users do.
del FUSERS._entries["test_gated"]


def inputs_of(fuser: Fuser, features: FeatureMaps) -> tuple[Any, ...]:
    """The maps and, for a fuser that takes one, a condition that each image has of its own."""
    if fuser.condition_channels is None:
        return (features,)
    summary = features.maps[-1].detach().mean(1)
    return features, summary.repeat(1, fuser.condition_channels)[:, : fuser.condition_channels]


def _resampling(options: dict[str, Any], num_layers: int, grid: Grid, in_channels: int) -> int:
    """Operations of `spatial_aggregator` for maps whose grid is not the output grid times the window."""
    window = options.get("windows", 1)
    height, width = options.get("grid") or [max(edge // window, 1) for edge in grid]
    cells = 0 if (height * window, width * window) == grid else height * width * window**2
    return 8 * num_layers * cells * in_channels


def _averaged_cells(options: dict[str, Any], grid: Grid, num_layers: int) -> int:
    """Cells of all maps that dense_connector averages into others."""
    mode = options.get("mode", "dci")
    if mode == "dci":
        inside = options.get("query_in_groups", num_layers % options.get("groups", 2) == 0)
        return math.prod(grid) * (num_layers if inside else num_layers - 1)
    rows, columns = options.get("pool", (0, 0))
    pooled = (grid[0] // rows * rows) * (grid[1] // columns * columns) if rows else math.prod(grid) // 8 * 8
    return (num_layers - 1) * pooled if mode == "sti" else 0


def _resizing(options: dict[str, Any], num_layers: int, grid: Grid, in_channels: int) -> int:
    """Operations of `concat` for maps of another grid than the output's."""
    target = options.get("grid", grid)
    read = {None: 0, "bilinear": 4, "bicubic": 16, "nearest": 0}[options.get("resize")]
    return 0 if target == grid else 2 * num_layers * read * math.prod(target) * in_channels


def uncounted_flops(name: str, options: dict[str, Any], *, num_layers: int, grid: Grid, in_channels: int) -> int:
    """Operations of weighted sums, which run as element-wise work or embedding_bag and are not seen by the counter."""
    numbers = math.prod(grid) * in_channels
    sums = {
        "average": 2 * num_layers * numbers,
        "concat": _resizing(options, num_layers, grid, in_channels),
        "dense_connector": 2 * in_channels * _averaged_cells(options, grid, num_layers),
        "depth_attention": 2 * num_layers * numbers * (1 + (options.get("logits") == "own")),
        "mmfuser": 2 * num_layers * numbers * 4 * options.get("num_points", 4),
        "scalar_mix": 2 * num_layers * numbers,
        "spatial_aggregator": _resampling(options, num_layers, grid, in_channels),
        "text_gated": 2 * (num_layers + 2) * numbers,
    }
    return sums.get(name, 0)
