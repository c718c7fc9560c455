"""Check and time what layerfuse's speed rests on, in one call: the op, the MMFuser block, the whole encoder.

    python benchmarks/run.py                      # everything, on CUDA if there is one, else on the CPU
    python benchmarks/run.py --only op --runs 5

Random weights and inputs; nothing is downloaded. Rows go to benchmarks/results/<device>.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from measure import Session, relative_error  # noqa: E402

from layerfuse import FeatureMaps  # noqa: E402
from layerfuse.backbones import TransformersBackbone  # noqa: E402
from layerfuse.encoder import FusedEncoder  # noqa: E402
from layerfuse.fusers import MMFuser  # noqa: E402
from layerfuse.ops import deformable_attention  # noqa: E402
from layerfuse.testing import random_features, randomise_parameters  # noqa: E402

# The size of the paper: ViT-L/14 at 336 pixels, five taps.
GRID = (24, 24)
CHANNELS, NUM_HEADS, NUM_POINTS, NUM_LAYERS = 1024, 16, 4, 5
LAYERS = (3, 8, 13, 18, 23)


class DenseCrossAttention(nn.Module):
    """The peer: the same block with dense multi-head attention (SDPA) in both places."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(channels, eps=1e-6) for _ in range(3))
        self.projections = nn.ModuleList(nn.Linear(channels, channels) for _ in range(8))

    def _attend(self, query: torch.Tensor, values: torch.Tensor, first: int) -> torch.Tensor:
        to_query, to_key, to_value, to_output = self.projections[first : first + 4]

        def split(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        attended = F.scaled_dot_product_attention(
            split(to_query(query)), split(to_key(values)), split(to_value(values))
        )
        return to_output(attended.transpose(1, 2).flatten(2))

    def forward(self, features: FeatureMaps) -> torch.Tensor:
        """Fuse L maps (B, N, C) into (B, N, C)."""
        query = features.maps[-1]
        attended = self._attend(self.norms[0](query), self.norms[1](torch.cat(features.maps[:-1], dim=1)), 0)
        inner = self.norms[2](attended)
        return query + attended + self._attend(inner, inner, 4)


def _without_gradients(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    return torch.no_grad()(call)


def _backward(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
    return lambda: call().float().sum().backward()


def bench_op(session: Session, *, batch_size: int, dtype: torch.dtype, runs: int, compiled: bool) -> None:
    """Paths of deformable attention, forward and forward + backward, each checked against float64."""
    device, num_queries, levels = session.device, GRID[0] * GRID[1], NUM_LAYERS - 1
    grids = (GRID,) * levels
    shape = (batch_size, num_queries, NUM_HEADS, levels, NUM_POINTS)
    value = torch.randn(batch_size, levels * num_queries, NUM_HEADS, CHANNELS // NUM_HEADS, device=device).to(dtype)
    # As at the start of training: a few cells around each query's own, some of them outside the map.
    centre = torch.rand(batch_size, num_queries, 1, 1, 1, 2, device=device)
    locations = centre + torch.randn(*shape, 2, device=device) * 2.5 / GRID[0]
    weights = torch.randn(shape, device=device).flatten(3).softmax(-1).view(shape)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]

    def attend(v: torch.Tensor, x: torch.Tensor, w: torch.Tensor, path: str = "gather") -> torch.Tensor:
        return deformable_attention(v, grids, x, w, implementation=path)

    calls: dict[str, Callable[[], torch.Tensor]] = {
        "reference": lambda: attend(*leaves, "reference"),
        "gather": lambda: attend(*leaves),
    }
    if compiled:
        fast = torch.compile(attend, fullgraph=True, dynamic=False)
        calls["gather, compiled"] = lambda: fast(*leaves)
    with torch.no_grad():
        exact = attend(value.double(), locations.double(), weights.double(), "reference")
        errors = {label: relative_error(call(), exact) for label, call in calls.items()}
    facts = {"batch_size": batch_size, "dtype": str(dtype).removeprefix("torch."), "grid": GRID, "levels": levels}
    for name, wrap in (("op forward", _without_gradients), ("op forward+backward", _backward)):
        wrapped = {label: wrap(call) for label, call in calls.items()}
        session.compare(name, wrapped, baseline="reference", runs=runs, facts=facts, errors=errors)


def bench_block(session: Session, *, batch_size: int, dtype: torch.dtype, runs: int, compiled: bool) -> None:
    """The MMFuser block on each path, against the same block with dense attention."""
    features = random_features(CHANNELS, num_layers=NUM_LAYERS, grids=GRID, batch_size=batch_size)
    features = FeatureMaps(
        maps=tuple(x.to(session.device, dtype) for x in features), layers=features.layers, grids=features.grids
    )
    gather = MMFuser(CHANNELS, NUM_LAYERS, implementation="gather")
    randomise_parameters(gather, std=0.02)
    reference = MMFuser(CHANNELS, NUM_LAYERS, implementation="reference")
    reference.load_state_dict(gather.state_dict())
    blocks: dict[str, nn.Module] = {
        "dense attention (SDPA)": DenseCrossAttention(CHANNELS, NUM_HEADS),
        "mmfuser, reference": reference,
        "mmfuser, gather": gather,
    }
    blocks = {label: block.to(session.device, dtype) for label, block in blocks.items()}
    if compiled:
        blocks["mmfuser, gather, compiled"] = torch.compile(blocks["mmfuser, gather"], fullgraph=True, dynamic=False)
    calls = {label: (lambda block=block: block(features)) for label, block in blocks.items()}
    with torch.no_grad():
        # What the block adds to its query: beside the query itself, an error would not show.
        query = features.maps[-1]
        exact = calls["mmfuser, reference"]() - query
        errors = {label: relative_error(call() - query, exact) for label, call in calls.items() if "gather" in label}
    facts = {"batch_size": batch_size, "dtype": str(dtype).removeprefix("torch."), "grid": GRID, "channels": CHANNELS}
    for name, wrap in (("block forward", _without_gradients), ("block forward+backward", _backward)):
        wrapped = {label: wrap(call) for label, call in calls.items()}
        session.compare(name, wrapped, baseline="dense attention (SDPA)", runs=runs, facts=facts, errors=errors)


def bench_encoder(session: Session, *, batch_size: int, dtype: torch.dtype, runs: int) -> None:
    """ViT-L/14-336 cut after block 23, five taps and MMFuser, against the whole tower with all hidden states."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=CHANNELS,
        intermediate_size=4 * CHANNELS,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    tower = CLIPVisionModel(config).eval()
    backbone = TransformersBackbone(CLIPVisionModel(config), layers=LAYERS)
    backbone.model.load_state_dict(tower.state_dict(), strict=False)
    encoder = FusedEncoder(backbone, MMFuser(CHANNELS, NUM_LAYERS)).eval()
    tower, encoder = tower.to(session.device, dtype), encoder.to(session.device, dtype)
    images = torch.randn(batch_size, 3, 336, 336, device=session.device, dtype=dtype)

    def plain() -> torch.Tensor:
        states = tower(pixel_values=images, output_hidden_states=True).hidden_states
        return states[-2][:, 1:]

    def fused() -> torch.Tensor:
        return encoder(images)

    calls = {"plain tower, all hidden states": plain, "cut tower + 5 taps + mmfuser": fused}
    with torch.no_grad():
        # A new MMFuser is the identity, so that the two must give the same tokens.
        errors = {"cut tower + 5 taps + mmfuser": relative_error(fused(), plain())}
    session.compare(
        "encoder forward",
        {label: _without_gradients(call) for label, call in calls.items()},
        baseline="plain tower, all hidden states",
        runs=runs,
        facts={"batch_size": batch_size, "dtype": str(dtype).removeprefix("torch."), "layers": LAYERS},
        errors=errors,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--only", choices=("op", "block", "encoder", "train"), action="append", help="repeat for several"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", help="default: 1 4 on the CPU, 1 16 on CUDA")
    parser.add_argument("--runs", type=int, default=None, help="timed calls; default: 5 on the CPU, 30 on CUDA")
    parser.add_argument("--recipe", default="mmfuser_7b", help="what train makes a step of; needs the llava extra")
    parser.add_argument("--gpu", default="h200", help="the GPU that train's estimate reckons with")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's own choice")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="goes into every row, such as: machine shared")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>.jsonl")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    device = arguments.device
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    path = arguments.output or ROOT / "benchmarks" / "results" / f"{device}.jsonl"
    session = Session(device=device, seed=arguments.seed, note=arguments.note, path=path)
    runs = arguments.runs or (5 if device == "cpu" else 30)
    parts = arguments.only or ["op", "block", "encoder", *(["train"] if device == "cuda" else [])]
    compiled = not arguments.no_compile
    for dtype in (torch.float32,) if device == "cpu" else (torch.float32, torch.bfloat16):
        for batch_size in arguments.batch_sizes or ([1, 4] if device == "cpu" else [1, 16]):
            if "op" in parts:
                bench_op(session, batch_size=batch_size, dtype=dtype, runs=runs, compiled=compiled)
            if "block" in parts:
                bench_block(session, batch_size=batch_size, dtype=dtype, runs=runs, compiled=compiled)
            # A batch of images through ViT-L takes a CPU half a minute, and tells no more than one image does.
            if "encoder" in parts and (device == "cuda" or batch_size == 1):
                bench_encoder(session, batch_size=batch_size, dtype=dtype, runs=runs)
    if "train" in parts:
        from training import bench_training_step

        bench_training_step(session, recipe=arguments.recipe, gpu=arguments.gpu, runs=3)


if __name__ == "__main__":
    main()
