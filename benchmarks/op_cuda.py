"""Deformable attention on CUDA: correct first, then against its peers, then against the memory's bandwidth.

Times are those of a replayed CUDA graph where a candidate can be captured, so that they are the device's alone; else
the row says `eager`.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional as F

from benchmarks import op
from benchmarks.measure import Call, captured, time_in_turn
from benchmarks.memory import extra_bytes
from benchmarks.op_inputs import Inputs, backward, check, draw_inputs, forward
from benchmarks.peers import Attend, deformops_attention, is_installed, transformers_attention
from benchmarks.session import Session
from layerfuse.ops import least_traffic

__all__ = ["check_oracle", "replayable", "run"]

# Of values and gradients in bfloat16 against float64; of float32 as on the CPU.
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}


def check_oracle(session: Session) -> dict[str, str]:
    """Hold every implementation against float64, output and gradients; return what is wrong with those that fail."""
    wrong: dict[str, str] = {}
    for batch_size, edge, levels, head_channels in session.pick(((2, 24, 4, 64), (3, 7, 2, 24)), (), ((2, 4, 2, 8),)):
        for dtype, tolerance in _TOLERANCES.items():
            inputs = draw_inputs(
                batch_size, edge, levels=levels, head_channels=head_channels, dtype=dtype, device=session.device
            )
            for label, attend in _ours(session, inputs).items():
                case = f"B={batch_size} {edge}² L={levels} {dtype}".replace("torch.", "")
                with session.attempt("op oracle", label, case=case):
                    error = check({label: attend}, inputs)[label]
                    session.record("op oracle", label, case=case, relative_error=error, right=error < tolerance)
                    if not error < tolerance:
                        wrong[label] = f"differs from float64 by {error:.2g} ({case})"
    return wrong


def run(session: Session) -> None:
    """Measure forward and forward + backward in bfloat16, after the check."""
    for name in op.absent(session.device):
        session.not_measured("op forward", name, f"cannot run on {session.device} here")
    wrong = check_oracle(session)
    ceiling = _copy_ceiling(session)
    for batch_size in session.pick((16, 64), (16,), (1,)):
        inputs = draw_inputs(
            batch_size,
            session.pick(24, 24, 4),
            **session.pick({}, {}, {"num_heads": 2, "head_channels": 8}),
            dtype=torch.bfloat16,
            device=session.device,
            seed=session.seed,
        )
        attends = {**_ours(session, inputs), **_peers(session, inputs)}
        for name, wrap in (("op forward", forward), ("op forward+backward", backward)):
            with session.attempt(name, "auto", case=f"B={batch_size}"):
                _compare(session, name, wrap, attends, inputs, wrong=wrong, ceiling=ceiling)


def _ours(session: Session, inputs: Inputs) -> dict[str, Attend]:
    return op.implementations(session.device, inputs.grids)


def _peers(session: Session, inputs: Inputs) -> dict[str, Attend]:
    found: dict[str, Attend] = {"transformers": transformers_attention(inputs.grids, session.device)}
    found["transformers, compiled"] = session.compile(found["transformers"])
    found["dense SDPA over all keys"] = functools.partial(_dense, inputs.locations.shape[1])
    if is_installed("deformops"):
        with session.attempt("op forward", "deformops"):
            found["deformops"] = deformops_attention(inputs.grids, session.device)
    else:
        session.not_measured("op forward", "deformops", "deformops is not installed")
    return found


def _dense(num_queries: int, value: torch.Tensor, locations: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Attend from so many queries to all values: what the sampling is there to save."""
    keys = value.transpose(1, 2)
    attended = F.scaled_dot_product_attention(keys[:, :, :num_queries], keys, keys)
    # Two numbers of no weight, so that there is a gradient to ask for.
    return attended.transpose(1, 2).flatten(2) + 0 * (locations.flatten()[0] + weights.flatten()[0]).to(value.dtype)


def _compare(
    session: Session,
    name: str,
    wrap: object,
    attends: dict[str, Attend],
    inputs: Inputs,
    *,
    wrong: dict[str, str],
    ceiling: float,
) -> None:
    case = f"B={inputs.value.shape[0]} bf16"
    facts = {"batch_size": inputs.value.shape[0], "dtype": "bfloat16", "grid": list(inputs.grids[0]), "levels": 4}
    calls: dict[str, Call] = {}
    for label, attend in attends.items():
        with session.attempt(name, label, case=case):
            if label in wrong:
                raise AssertionError(wrong[label])
            calls[label] = replayable(session, name, label, wrap(attend, inputs), case)  # type: ignore[operator]
    ours = tuple(label for label in _ours(session, inputs) if label in calls)
    timings = session.compare(name, calls, ours=ours, pace=session.pace(3.0, fewest=10), case=case, facts=facts)
    one_way, back = least_traffic(*inputs.leaves)
    moved = one_way + (0 if wrap is forward else back)
    for label in ours:
        share = moved / timings[label].median / ceiling
        session.record(
            f"{name}, share of bandwidth",
            label,
            case=case,
            value=round(share, 4),
            unit="share of the copy's bytes per second",
            bytes_moved=moved,
            bytes_per_second=round(moved / timings[label].median),
            ceiling=round(ceiling),
            **facts,
        )
    eager = {label: wrap(attend, inputs) for label, attend in attends.items() if label in calls}  # type: ignore[operator]
    session.compare(f"{name}, from Python", eager, ours=ours, pace=session.pace(2.0, fewest=5), case=case, facts=facts)
    needed = {label: extra_bytes(call, device=session.device) for label, call in eager.items()}
    session.compare_values(f"{name}, extra memory", needed, ours=ours, unit="bytes", case=case, **facts)


def replayable(session: Session, name: str, label: str, call: Call, case: str) -> Call:
    """Return a captured call, or the call itself where capturing fails, which a row then says."""
    call()
    if session.device != "cuda":
        return call
    try:
        return captured(call)
    except RuntimeError as error:
        torch.cuda.synchronize()
        session.not_measured(f"{name}, CUDA graph", label, f"eager instead: {str(error)[:200]}", case=case)
        return call


def _copy_ceiling(session: Session) -> float:
    """Bytes per second, read and written, of a copy of 2 GiB: what this device's memory gives at best."""
    count = session.pick(2**30, 2**20, 2**16)
    source = torch.empty(count, dtype=torch.bfloat16, device=session.device)
    target = torch.empty_like(source)
    pace = session.pace(1.0, fewest=10)
    seconds = time_in_turn({"copy": lambda: target.copy_(source)}, device=session.device, pace=pace)["copy"].median
    ceiling = 2 * source.nbytes / seconds
    session.record("copy", "torch", value=round(ceiling), unit="bytes per second, read and written")
    return ceiling
