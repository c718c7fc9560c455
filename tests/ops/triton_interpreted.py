"""Run by test_triton_interpreted.py in a process of its own: the kernels in Triton's interpreter against the oracle.

Prints a line of JSON: how many cases of each kind were compared, and what was wrong with which.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # read where Triton is first imported

import torch
from triton import language as tl

from layerfuse.ops.deformable import triton as kernels
from layerfuse.ops.deformable.reference import reference

# What the last digit of a number is worth: the interpreter cuts off where a GPU rounds.
LAST_DIGIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
NAMES = ("output", "grad_value", "grad_locations", "grad_weights")
HALVES = (torch.float16, torch.bfloat16)
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A call of the kernels, and how to change what was drawn for it."""

    kind: str
    grids: tuple[tuple[int, int], ...]
    batch_size: int = 1
    num_queries: int = 3
    num_heads: int = 1
    head_channels: int = 4
    num_points: int = 1
    dtype: torch.dtype = torch.float32
    change: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Tensors] = lambda *drawn: drawn
    wanted: tuple[bool, bool, bool] = (True, True, True)
    settings: dict[str, Any] = field(default_factory=dict)


def drawn_cases() -> Iterator[Case]:
    draw = random.Random(11)
    for number in range(20):
        grids = tuple((draw.randint(1, 5), draw.randint(1, 5)) for _ in range(draw.choice([1, 1, 2, 3])))
        if number % 4 == 0:
            grids = (grids[0], *grids)  # a run of two
        shape = {
            "batch_size": draw.choice([1, 1, 2]),
            "num_queries": draw.choice([1, 2, 5]),
            "num_heads": draw.choice([1, 2]),
            "head_channels": draw.choice([1, 3, 8, 64, 80]),
            "num_points": draw.choice([1, 1, 2]),
        }
        for dtype in (torch.float32, torch.bfloat16):
            yield Case("drawn", grids, dtype=dtype, **shape)


def special_cases() -> Iterator[Case]:
    grids = ((2, 3), (4, 1))
    for dtype in (torch.float16, torch.float64):
        yield Case("dtype", grids, dtype=dtype)
    # All of these are numbers that have no rest in any type: cell centres, edges between cells, the map's own.
    exact = torch.arange(-2, 19) / 16
    places = torch.cartesian_prod(exact, exact).view(1, -1, 1, 1, 1, 2)
    for dtype in (torch.float32, torch.bfloat16):
        yield Case(
            "border",
            ((4, 8),),
            num_queries=21 * 21,
            num_heads=1,
            num_points=1,
            dtype=dtype,
            change=lambda value, _, weights: (value, places, weights),
        )
    yield Case("outside", grids, change=lambda value, locations, weights: (value, locations + 3, weights))
    yield Case("outside", grids, change=lambda value, locations, weights: (value, locations * 1e30, weights))
    yield Case("places in half", grids, change=lambda value, locations, weights: (value, locations.bfloat16(), weights))
    for name, strides in (
        ("heads first", lambda value, *rest: (value.transpose(1, 2).contiguous().transpose(1, 2), *rest)),
        ("channels apart", lambda value, *rest: (value.transpose(1, 3).contiguous().transpose(1, 3), *rest)),
        ("every other image", lambda value, *rest: (value.repeat_interleave(2, 0)[::2], *rest)),
        ("one row for all", lambda value, *rest: (value[:, :1].expand_as(value), *rest)),
    ):
        yield Case(f"strides: {name}", grids, batch_size=2, num_heads=2, head_channels=3, change=strides)
    for name, sizes in (("image", {"batch_size": 0}), ("query", {"num_queries": 0})):
        yield Case(f"no {name}", grids, **sizes)
    for dtype in (torch.float32, torch.bfloat16):
        yield Case("int64", grids, batch_size=2, num_heads=2, dtype=dtype, settings={"_MOST_ELEMENTS": 1})
    small = {"FORWARD_BLOCKS": kernels.Blocks(8, 2), "BACKWARD_BLOCKS": kernels.Blocks(16, 2)}
    yield Case("blocks", grids, num_queries=7, settings=small)
    for wanted in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        yield Case("wanted", grids, wanted=wanted)


def faults(case: Case) -> list[str]:
    """Return what the kernels compute otherwise than the oracle does in float64 from the same numbers."""
    generator = torch.Generator().manual_seed(5)
    precise = torch.promote_types(case.dtype, torch.float32)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = sum(height * width for height, width in case.grids)
    points = (case.batch_size, case.num_queries, case.num_heads, len(case.grids), case.num_points)
    value = draw(case.batch_size, rows, case.num_heads, case.head_channels).to(case.dtype)
    # Multiples of 2**-10: between which cells a place lies is the same in any precision.
    locations = (torch.randint(-200, 1225, (*points, 2), generator=generator) / 1024).to(precise)
    inputs = case.change(value, locations, draw(*points).to(precise))
    cotangent = draw(case.batch_size, case.num_queries, case.num_heads * case.head_channels).to(case.dtype)

    leaves = [tensor.double().contiguous().requires_grad_() for tensor in inputs]
    expected: list[Any] = [reference(leaves[0], case.grids, leaves[1], leaves[2])]
    expected += torch.autograd.grad(expected[0], leaves, cotangent.double())
    normal = {name: getattr(kernels, name) for name in case.settings}
    for name, setting in case.settings.items():
        setattr(kernels, name, setting)
    value, locations, weights = inputs
    result = [kernels.forward(value, case.grids, locations, weights)]
    result += kernels.backward(cotangent, value, case.grids, locations, weights, wanted=case.wanted)
    wide = kernels._arguments(value, case.grids, locations)["INDEX"] == tl.int64
    for name, setting in normal.items():
        setattr(kernels, name, setting)

    found = [] if wide == ("_MOST_ELEMENTS" in case.settings) else ["wrong type of index"]
    dtypes = [value.dtype, *(tensor.dtype for tensor in inputs)]
    for name, ours, theirs, dtype, asked in zip(NAMES, result, expected, dtypes, (True, *case.wanted), strict=True):
        found += [f"{name}: {fault}" for fault in difference(ours, theirs.detach() if asked else None, dtype)]
    return found


def difference(ours: torch.Tensor | None, theirs: torch.Tensor | None, dtype: torch.dtype) -> list[str]:
    if ours is None or theirs is None:
        return [] if ours is theirs else ["there is one, or none, that should not be"]
    if ours.dtype != dtype or ours.shape != theirs.shape or not ours.is_contiguous():
        return [f"{ours.dtype}, {tuple(ours.shape)}, contiguous: {ours.is_contiguous()}"]
    # Sums are of float32 at best, and as precise as the largest numbers of which they are the differences.
    size = theirs.abs().max().item() if theirs.numel() else 0.0
    try:
        torch.testing.assert_close(
            ours.double(), theirs, rtol=LAST_DIGIT[dtype], atol=size * (1e-12 if dtype == torch.float64 else 2e-6)
        )
    except AssertionError as error:
        return [str(error)]
    return []


def nan_faults() -> list[str]:
    """NaN in a place or a weight, and infinity in a place, show in the output of their query and head alone."""
    found = []
    for spoilt, (number, place) in enumerate(((float("nan"), 0), (float("inf"), 1), (float("nan"), None))):
        value, locations, weights = torch.rand(1, 6, 2, 4), torch.rand(1, 3, 2, 1, 2, 2), torch.rand(1, 3, 2, 1, 2)
        if place is None:
            weights[0, spoilt, 1, 0, 1] = number
            locations[0, spoilt, 1, 0, 1] = 9.0
        else:
            locations[0, spoilt, 1, 0, 1, place] = number
        output = kernels.forward(value, [(2, 3)], locations, weights).view(3, 2, 4)
        expected = torch.zeros(3, 2, 4, dtype=torch.bool)
        expected[spoilt, 1] = True
        if not torch.equal(output.isnan(), expected):
            found.append(f"{number} at {place}: {output.isnan().tolist()}")
        gradients = kernels.backward(torch.ones(1, 3, 8), value, [(2, 3)], locations, weights)
        if not (place is None or gradients[2][0, spoilt, 1, 0, 1].isnan().item()):
            found.append(f"{number} at {place}: the weight's gradient is a number")
    return found


def main() -> None:
    counts: Counter[str] = Counter()
    found = []
    for case in (*drawn_cases(), *special_cases()):
        torch.manual_seed(0)
        counts[f"{case.kind} {str(case.dtype).removeprefix('torch.')}"] += 1
        found += [f"{case}: {fault}" for fault in faults(case)]
    torch.manual_seed(0)
    found += nan_faults()
    print(json.dumps({"counts": counts, "faults": found}))


if __name__ == "__main__":
    main()
