"""Deformable attention on the CPU: every implementation against transformers' own; time, memory, bfloat16, the block.

python -m benchmarks.op
"""

from __future__ import annotations

import torch

from benchmarks import op_cuda
from benchmarks.memory import extra_bytes
from benchmarks.op_inputs import Inputs, backward, check, draw_inputs, forward
from benchmarks.peers import Attend, DenseCrossAttention, transformers_attention
from benchmarks.session import Session
from layerfuse import FeatureMaps
from layerfuse.fusers import MMFuser
from layerfuse.ops import IMPLEMENTATIONS, deformable_attention
from layerfuse.ops.deformable.operator import KERNELS, can_run
from layerfuse.testing import random_features, randomise_parameters

__all__ = ["absent", "implementations", "run"]

# Of float32 against float64.
TOLERANCE = 1e-3


def run(session: Session) -> None:
    """Measure the op for whichever device the goals are of."""
    if session.goals_of == "cuda":
        op_cuda.run(session)
        return
    for name in absent(session.device):
        session.not_measured("op forward", name, f"cannot run on {session.device} here")
    for batch_size in session.pick((1, 4, 16), (1,), (1,)):
        for edge in session.pick((16, 24, 48), (16, 24), (4,)):
            with session.attempt("op forward", "auto", case=_case(batch_size, edge)):
                _compare(session, batch_size, edge)
    with session.attempt("op bf16 against fp32", "bfloat16"):
        _half_precision(session)
    with session.attempt("sampling in the block", "mmfuser"):
        _block(session)


def implementations(device: str, grids: tuple[tuple[int, int], ...]) -> dict[str, Attend]:
    """Return the implementations of deformable attention that run on a device, but for the oracle."""

    def bind(name: str) -> Attend:
        return lambda value, x, w: deformable_attention(value, grids, x, w, implementation=name)

    return {name: bind(name) for name in IMPLEMENTATIONS if name != "reference" and name not in absent(device)}


def absent(device: str) -> list[str]:
    """Name the kernels that cannot run on a device here: another would silently take their place."""
    return [name for name in KERNELS if not can_run(name, device)]


def _case(batch_size: int, edge: int) -> str:
    return f"B={batch_size} {edge}²"


def _compare(session: Session, batch_size: int, edge: int) -> None:
    inputs = _inputs(session, batch_size, edge)
    ours = implementations(session.device, inputs.grids)
    if batch_size > 4:  # a large batch takes long, and the slower ones are known by now
        ours = {"auto": ours["auto"]}
    attends = {**ours, "transformers": transformers_attention(inputs.grids, session.device)}
    errors = check(attends, inputs)
    wrong = {label: error for label, error in errors.items() if not error < TOLERANCE}
    if wrong:
        raise AssertionError(f"these differ from float64 by more than {TOLERANCE}: {wrong}")
    case = _case(batch_size, edge)
    facts = {"batch_size": batch_size, "grid": [edge, edge], "levels": 4, "dtype": "float32"}
    for name, wrap in (("op forward", forward), ("op forward+backward", backward)):
        calls = {label: wrap(attend, inputs) for label, attend in attends.items()}
        pace = session.pace(4.0, fewest=3 if batch_size <= 4 else 2)
        session.compare(name, calls, ours=tuple(ours), pace=pace, case=case, facts=facts, errors=errors)
        needed = {label: extra_bytes(call, device=session.device) for label, call in calls.items()}
        session.compare_values(f"{name}, extra memory", needed, ours=tuple(ours), unit="bytes", case=case, **facts)


def _inputs(session: Session, batch_size: int, edge: int, dtype: torch.dtype = torch.float32) -> Inputs:
    heads, width = session.pick((16, 64), (16, 64), (2, 8))
    return draw_inputs(
        *(batch_size, edge),
        num_heads=heads,
        head_channels=width,
        dtype=dtype,
        device=session.device,
        seed=session.seed,
    )


def _half_precision(session: Session) -> None:
    batch_size, edge = session.pick((4, 24), (1, 16), (1, 4))
    calls = {}
    for dtype in (torch.bfloat16, torch.float32):
        inputs = _inputs(session, batch_size, edge, dtype)
        auto = implementations(session.device, inputs.grids)["auto"]
        calls[str(dtype).removeprefix("torch.")] = (forward(auto, inputs), backward(auto, inputs))
    for position, direction in enumerate(("forward", "forward+backward")):
        session.compare(
            "op bf16 against fp32",
            {label: pair[position] for label, pair in calls.items()},
            ours=("bfloat16",),
            pace=session.pace(6.0, fewest=5),
            case=f"{_case(batch_size, edge)} {direction}",
            facts={"batch_size": batch_size, "grid": [edge, edge]},
        )


def _block(session: Session) -> None:
    """Time the block, and in turn with it the sampling of its two attentions: of 4 levels and of 1."""
    batch_size, edge, channels = session.pick((4, 24, 1024), (1, 16, 1024), (1, 4, 32))
    features = random_features(channels, num_layers=5, grids=(edge, edge), batch_size=batch_size, seed=session.seed)
    block = MMFuser(channels, 5, num_heads=session.pick(16, 16, 2))
    randomise_parameters(block, std=0.02)
    dense = DenseCrossAttention(channels, num_heads=block.cross_attn.num_heads)
    cross = _inputs(session, batch_size, edge)
    inner = Inputs(*(leaf.detach().requires_grad_() for leaf in _one_level(cross)), grids=cross.grids[:1])
    auto = [implementations(session.device, part.grids)["auto"] for part in (cross, inner)]
    for direction, wrap in (("forward", forward), ("forward+backward", backward)):
        parts = [wrap(attend, part) for attend, part in zip(auto, (cross, inner), strict=True)]
        calls = {
            "mmfuser": _block_call(block, features, direction),
            "sampling alone": lambda parts=parts: [part() for part in parts],
            "dense attention (SDPA)": _block_call(dense, features, direction),
        }
        case = f"{_case(batch_size, edge)} {direction}"
        facts = {"batch_size": batch_size, "grid": [edge, edge], "channels": channels}
        timings = session.compare(
            "block", calls, ours=("mmfuser",), pace=session.pace(8.0, fewest=5), case=case, facts=facts
        )
        share = timings["sampling alone"].median / timings["mmfuser"].median
        session.record("sampling in the block", "mmfuser", case=case, value=round(share, 4), unit="share", **facts)


def _one_level(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    count = inputs.grids[0][0] * inputs.grids[0][1]
    return inputs.value[:, :count], inputs.locations[:, :, :, :1], inputs.weights[:, :, :, :1]


def _block_call(block: torch.nn.Module, features: FeatureMaps, direction: str) -> object:
    def call() -> object:
        with torch.set_grad_enabled(direction != "forward"):
            fused = block(maps)
            return torch.autograd.grad(fused.sum(), [*leaves, *block.parameters()]) if leaves else fused

    leaves = [] if direction == "forward" else [x.detach().requires_grad_() for x in features]
    maps = features if not leaves else FeatureMaps(tuple(leaves), layers=features.layers, grids=features.grids)
    return call


if __name__ == "__main__":
    from benchmarks.command import main

    main("op")
