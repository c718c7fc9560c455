"""What one run on a GPU decides: the path that `auto` takes for a class of shapes, and the blocks of Triton's kernels.

python -m benchmarks.op_choice --device cuda

Each class of shapes ends with a row that says which path was the fastest, and how much longer `auto` took. If one is
ahead of `auto` by more than the goal allows, it belongs into `_FASTEST` of layerfuse/ops/deformable/attention.py;
blocks ahead of "as set" belong into `FORWARD_BLOCKS` or `BACKWARD_BLOCKS` of layerfuse/ops/deformable/triton.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from benchmarks import op, op_cuda
from benchmarks.measure import Call
from benchmarks.op_inputs import Inputs, backward, draw_inputs, forward
from benchmarks.peers import Attend
from benchmarks.session import Session
from layerfuse.ops import deformable_attention
from layerfuse.ops.deformable import triton
from layerfuse.ops.deformable.operator import can_run
from layerfuse.ops.deformable.triton import Blocks

__all__ = ["run"]

AS_SET = "as set"
_DIRECTIONS = {"forward": forward, "forward+backward": backward}
# Batch, edge of the grids, levels, dtype: a chat's image, batches of training, large and small maps, MMFuser's inner
# attention, full precision.
_CLASSES = (
    (1, 24, 4, torch.bfloat16),
    (16, 24, 4, torch.bfloat16),
    (64, 24, 4, torch.bfloat16),
    (4, 64, 4, torch.bfloat16),
    (16, 8, 4, torch.bfloat16),
    (16, 24, 1, torch.bfloat16),
    (16, 24, 4, torch.float32),
)
# From four numbers a lane to sixteen.
_BLOCKS = {
    "forward": ((256, 1), (512, 1), (512, 2), (1024, 2), (1024, 8), (2048, 4), (2048, 8)),
    "forward+backward": ((128, 1), (256, 2), (512, 1), (512, 2), (1024, 4)),
}
_SETTINGS = {"forward": "FORWARD_BLOCKS", "forward+backward": "BACKWARD_BLOCKS"}
# Seconds of a full run, most of them for compiling.
_LONG = 60.0


def run(session: Session) -> None:
    """Compare our own paths by class of shapes, then blocks at MMFuser's size."""
    if not session.has_time(_LONG, "op choice", "auto"):
        return
    wrong = op_cuda.check_oracle(session)
    for batch_size, edge, levels, dtype in session.pick(_CLASSES, _CLASSES[1:2], ((1, 4, 2, torch.bfloat16),)):
        case = f"B={batch_size} {edge}² L={levels} {dtype}".replace("torch.", "")
        with session.attempt("op choice", "auto", case=case):
            inputs = _inputs(session, batch_size, edge, levels, dtype)
            paths = {**op.implementations(session.device, inputs.grids), "reference": _path("reference", inputs)}
            _choose(session, {name: path for name, path in paths.items() if name not in wrong}, inputs, case)
    if not can_run("triton", session.device):
        session.not_measured("op blocks", AS_SET, f"triton cannot run on {session.device} here")
        return
    inputs = _inputs(session, *session.pick((16, 24, 4), (16, 24, 4), (1, 4, 2)), torch.bfloat16)
    for direction in _DIRECTIONS:
        with session.attempt("op blocks", AS_SET, case=direction):
            _tune(session, inputs, direction)


def _inputs(session: Session, batch_size: int, edge: int, levels: int, dtype: torch.dtype) -> Inputs:
    sizes = session.pick({}, {}, {"num_heads": 2, "head_channels": 8})
    return draw_inputs(batch_size, edge, levels=levels, dtype=dtype, device=session.device, seed=session.seed, **sizes)


def _path(name: str, inputs: Inputs) -> Attend:
    return lambda value, x, w: deformable_attention(value, inputs.grids, x, w, implementation=name)


def _choose(session: Session, paths: Mapping[str, Attend], inputs: Inputs, case: str) -> None:
    for direction, wrap in _DIRECTIONS.items():
        calls = {
            name: op_cuda.replayable(session, "op choice", name, wrap(path, inputs), case)
            for name, path in paths.items()
        }
        _compare(session, "op choice", "auto", calls, case=f"{case} {direction}")


def _tune(session: Session, inputs: Inputs, direction: str) -> None:
    plain = _DIRECTIONS[direction](_path("triton", inputs), inputs)
    name = _SETTINGS[direction]
    own = getattr(triton, name)

    def with_blocks(blocks: Blocks) -> object:
        setattr(triton, name, blocks)
        try:
            return plain()
        finally:
            setattr(triton, name, own)

    blocks = {AS_SET: own}
    blocks |= {f"{elements} numbers, {warps} warps": Blocks(elements, warps) for elements, warps in _BLOCKS[direction]}
    calls = {
        label: op_cuda.replayable(session, "op blocks", label, functools.partial(with_blocks, each), direction)
        for label, each in blocks.items()
    }
    _compare(session, "op blocks", AS_SET, calls, case=direction)


def _compare(session: Session, name: str, chosen: str, calls: Mapping[str, Call], *, case: str) -> None:
    """Time candidates; the last row says which was the fastest, and how many times as long the chosen one took."""
    timings = session.compare(name, calls, ours=(), pace=session.pace(1.5, fewest=5), case=case, facts={})
    fastest = min(timings, key=lambda label: timings[label].median)
    share = timings[chosen].median / timings[fastest].median
    session.record(
        f"{name}, of the fastest", chosen, case=case, value=round(share, 4), unit="times as long", fastest=fastest
    )


if __name__ == "__main__":
    from benchmarks.command import main

    main("op_choice")
