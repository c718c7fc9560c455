"""Triton kernels of deformable attention: a program takes one head of one image and a block of its queries.

Imported by ``layerfuse.ops.deformable.triton`` when they are first launched: importing them needs Triton.

A point is read as four rows of D channels, each contiguous in memory, and the points of a level one after another.
Programs that are neighbours share head and image, so that a map comes from DRAM once and from the caches from then on.
Levels of equal grids are one run and one loop, so that code does not grow with their number. Arithmetic is in
``PRECISION``, whatever type the tensors hold; ``INDEX`` numbers the elements of one image.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward_kernel(
    value: tl.tensor,
    locations: tl.tensor,
    weights: tl.tensor,
    output: tl.tensor,
    heights: tl.tensor,
    widths: tl.tensor,
    image_stride: tl.tensor,
    row_stride: tl.tensor,
    num_queries: tl.tensor,
    num_heads: tl.tensor,
    num_places: tl.tensor,
    LEVELS: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
) -> None:
    """Write the weighted sum of every query's points to ``output`` (B, Q, M, D).

    ``value`` has its own strides, the other tensors are contiguous. ``heights``, ``widths`` and ``LEVELS`` (how many)
    have an entry per run of equal grids; ``num_places`` is L*K.
    """
    image, head, query, channel = _program(num_queries, num_heads, BLOCK_QUERIES, BLOCK_CHANNELS)
    asked = query < num_queries
    there = channel < CHANNELS
    value += image * image_stride + head * HEAD_STRIDE
    locations += image * num_queries * num_heads * num_places * 2
    weights += image * num_queries * num_heads * num_places
    output += image * num_queries * num_heads * CHANNELS
    item = query.to(INDEX) * num_heads + head.to(INDEX)
    place = item * num_places
    start = 0
    total = tl.zeros((BLOCK_QUERIES, BLOCK_CHANNELS), PRECISION)
    for run in tl.static_range(len(heights)):
        height = heights[run]
        width = widths[run]
        for point in tl.range(0, LEVELS[run] * POINTS, loop_unroll_factor=4):
            x, y, weight = _point(locations, weights, place + point, asked, PRECISION)
            column, right, inside_left, inside_right = _cell(x, width)
            line, lower, inside_upper, inside_lower = _cell(y, height)
            row = (start + point // POINTS * (height * width) + line * width + column).to(INDEX)
            cells = value + (row * row_stride)[:, None] + channel[None, :]
            below = cells + tl.cast(width, INDEX) * row_stride
            upper_left = _read(cells, inside_upper & inside_left, there, PRECISION)
            upper_right = _read(cells + row_stride, inside_upper & inside_right, there, PRECISION)
            lower_left = _read(below, inside_lower & inside_left, there, PRECISION)
            lower_right = _read(below + row_stride, inside_lower & inside_right, there, PRECISION)
            upper = weight * (1 - lower)
            lower = weight * lower
            # Cells outside are zeros that are multiplied, not left out: NaN in a place or a weight has to show.
            total += (upper * (1 - right))[:, None] * upper_left
            total += (upper * right)[:, None] * upper_right
            total += (lower * (1 - right))[:, None] * lower_left
            total += (lower * right)[:, None] * lower_right
        start += LEVELS[run] * height * width
        place += LEVELS[run] * POINTS
    tl.store(output + (item * CHANNELS)[:, None] + channel[None, :], total, mask=asked[:, None] & there[None, :])


@triton.jit
def backward_kernel(
    grad_output: tl.tensor,
    value: tl.tensor,
    locations: tl.tensor,
    weights: tl.tensor,
    grad_value: tl.tensor,
    grad_locations: tl.tensor,
    grad_weights: tl.tensor,
    heights: tl.tensor,
    widths: tl.tensor,
    image_stride: tl.tensor,
    row_stride: tl.tensor,
    num_rows: tl.tensor,
    num_queries: tl.tensor,
    num_heads: tl.tensor,
    num_places: tl.tensor,
    LEVELS: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    POINTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
) -> None:
    """Add to ``grad_value``, a contiguous (B, S, M, D) of zeros in ``PRECISION``, and write the other two gradients.

    Each of the three may be None. With g the gradient of a query's output, all that places and weights need of value
    are the four products of g and a cell.
    """
    image, head, query, channel = _program(num_queries, num_heads, BLOCK_QUERIES, BLOCK_CHANNELS)
    asked = query < num_queries
    there = channel < CHANNELS
    value += image * image_stride + head * HEAD_STRIDE
    grad_output += image * num_queries * num_heads * CHANNELS
    first = image * num_queries * num_heads * num_places
    locations += 2 * first
    weights += first
    if grad_value is not None:
        grad_value += (image * num_rows * num_heads + head) * CHANNELS
    if grad_locations is not None:
        grad_locations += 2 * first
    if grad_weights is not None:
        grad_weights += first
    item = query.to(INDEX) * num_heads + head.to(INDEX)
    place = item * num_places
    start = 0
    grad = _read(grad_output + (item * CHANNELS)[:, None] + channel[None, :], asked, there, PRECISION)
    for run in tl.static_range(len(heights)):
        height = heights[run]
        width = widths[run]
        for point in tl.range(0, LEVELS[run] * POINTS):
            x, y, weight = _point(locations, weights, place + point, asked, PRECISION)
            column, right, inside_left, inside_right = _cell(x, width)
            line, lower, inside_upper, inside_lower = _cell(y, height)
            row = (start + point // POINTS * (height * width) + line * width + column).to(INDEX)
            left = 1 - right
            upper = 1 - lower
            if (grad_locations is not None) or (grad_weights is not None):
                cells = value + (row * row_stride)[:, None] + channel[None, :]
                below = cells + tl.cast(width, INDEX) * row_stride
                upper_left = _product(grad, cells, inside_upper & inside_left, there, PRECISION)
                upper_right = _product(grad, cells + row_stride, inside_upper & inside_right, there, PRECISION)
                lower_left = _product(grad, below, inside_lower & inside_left, there, PRECISION)
                lower_right = _product(grad, below + row_stride, inside_lower & inside_right, there, PRECISION)
                if grad_locations is not None:
                    grad_x = upper * (upper_right - upper_left) + lower * (lower_right - lower_left)
                    grad_y = left * (lower_left - upper_left) + right * (lower_right - upper_right)
                    tl.store(grad_locations + 2 * (place + point), weight * width * grad_x, mask=asked)
                    tl.store(grad_locations + 2 * (place + point) + 1, weight * height * grad_y, mask=asked)
                if grad_weights is not None:
                    grad_weight = upper * (left * upper_left + right * upper_right)
                    grad_weight += lower * (left * lower_left + right * lower_right)
                    tl.store(grad_weights + place + point, grad_weight, mask=asked)
            if grad_value is not None:
                upper *= weight
                lower *= weight
                stride = num_heads * CHANNELS
                cells = grad_value + (row * stride)[:, None] + channel[None, :]
                below = cells + tl.cast(width, INDEX) * stride
                _add(cells, upper * left, grad, inside_upper & inside_left, there)
                _add(cells + stride, upper * right, grad, inside_upper & inside_right, there)
                _add(below, lower * left, grad, inside_lower & inside_left, there)
                _add(below + stride, lower * right, grad, inside_lower & inside_right, there)
        start += LEVELS[run] * height * width
        place += LEVELS[run] * POINTS


@triton.jit
def _program(
    num_queries: tl.tensor, num_heads: tl.tensor, BLOCK_QUERIES: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
) -> tl.tuple:
    """Return the image and head (int64) of this program, its queries and its channels."""
    program = tl.program_id(0)
    blocks = tl.cdiv(num_queries, BLOCK_QUERIES)
    pair = (program // blocks).to(tl.int64)
    query = program % blocks * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    return pair // num_heads, pair % num_heads, query, tl.arange(0, BLOCK_CHANNELS)


@triton.jit
def _point(
    locations: tl.tensor, weights: tl.tensor, index: tl.tensor, asked: tl.tensor, PRECISION: tl.constexpr
) -> tl.tuple:
    """Return x, y and weight of a point per query; queries beyond the last are far outside of every map."""
    x = tl.load(locations + 2 * index, mask=asked, other=-9.0).to(PRECISION)
    y = tl.load(locations + 2 * index + 1, mask=asked, other=-9.0).to(PRECISION)
    return x, y, tl.load(weights + index, mask=asked, other=0.0).to(PRECISION)


@triton.jit
def _cell(place: tl.tensor, size: tl.tensor) -> tl.tuple:
    """Return the cell at or before a place along an axis, the share of the next one, and whether each is inside.

    Where neither is, the cell is 0: a float that is NaN or huge has no integer.
    """
    position = place * size - 0.5
    cell = tl.floor(position)
    inside = (cell >= 0) & (cell < size)
    next_inside = (cell >= -1) & (cell < size - 1)
    return tl.where(inside | next_inside, cell, 0.0).to(tl.int32), position - cell, inside, next_inside


@triton.jit
def _read(pointers: tl.tensor, rows: tl.tensor, channels: tl.tensor, PRECISION: tl.constexpr) -> tl.tuple:
    """Read rows of channels, zeros where a row or a channel is none."""
    return tl.load(pointers, mask=rows[:, None] & channels[None, :], other=0.0).to(PRECISION)


@triton.jit
def _product(
    grad: tl.tensor, pointers: tl.tensor, rows: tl.tensor, channels: tl.tensor, PRECISION: tl.constexpr
) -> tl.tuple:
    """Return the inner products of gradients and rows of value."""
    return tl.sum(grad * _read(pointers, rows, channels, PRECISION), axis=1)


@triton.jit
def _add(pointers: tl.tensor, factor: tl.tensor, grad: tl.tensor, rows: tl.tensor, channels: tl.tensor) -> None:
    """Add the gradients times their factors to rows that other programs add to as well."""
    tl.atomic_add(pointers, factor[:, None] * grad, mask=rows[:, None] & channels[None, :], sem="relaxed")
