"""Which layers of a Vision Transformer are tapped: numbers, shares of the depth, or an even spread.

Layers are numbered as in Hugging Face ``hidden_states``: 0 is the embedding output that enters block 1, ``k`` the
output of block ``k`` before any final norm; negative numbers count from the end (-1 = last block, -2 = penultimate).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Set
from contextlib import suppress
from fractions import Fraction
from functools import partial
from typing import Any, SupportsIndex

from layerfuse.errors import InputError, InvalidTypeError

__all__ = ["LayerChoice", "resolve_layers", "spread"]

# One layer, several, or a function from the number of blocks to several.
LayerChoice = SupportsIndex | float | Iterable[SupportsIndex | float] | Callable[[int], Iterable[SupportsIndex | float]]


def resolve_layers(layers: LayerChoice, num_blocks: int) -> tuple[int, ...]:
    """Turn a choice of layers into layer numbers, each 0..num_blocks, in the order asked.

    Args:
        layers: one layer or several (tuple, list, range, array), or a function that is given the number of blocks and
            returns them, such as `spread` makes. An integer is a layer number: 0 = embeddings, 1..num_blocks = block
            outputs, negatives count from the end, so that (-22, -17, -12, -7, -2) is (3, 8, 13, 18, 23) on a 24-block
            ViT. A float in (0, 1] is a share of the depth, rounded half up, at least 1: of 24 blocks 0.25 is layer 6
            and 1.0 the last.
        num_blocks: of the whole backbone.

    Raises:
        ValueError: if no layer is given, one is out of range, or one is asked for twice.
        TypeError: if a layer is no number.
    """
    chosen: Any = layers(num_blocks) if callable(layers) else layers
    if isinstance(chosen, (str, Set, Mapping)):
        raise InvalidTypeError(
            f"layers must be numbers, got the {type(chosen).__name__} {chosen!r}; write them in the order wanted, for "
            "example (3, 8, -2)."
        )
    several = isinstance(chosen, Iterable) and getattr(chosen, "ndim", 1) > 0
    asked: tuple[Any, ...] = tuple(chosen) if several else (chosen,)
    if not asked:
        raise InputError("no layer was asked for; give at least one, for example layers=-2 (the penultimate block).")
    resolved: dict[int, Any] = {}
    for given in asked:
        layer = _layer_number(given, num_blocks)
        if layer in resolved:
            twice = f"{given} twice" if resolved[layer] == given else f"{resolved[layer]} and {given}"
            raise InputError(
                f"layers {asked} ask for the same map more than once ({twice}; {num_blocks} blocks); name each once."
            )
        resolved[layer] = given
    return tuple(resolved)


def _layer_number(given: Any, num_blocks: int) -> int:
    kind = str(getattr(given, "dtype", type(given)))
    if "float" in kind and getattr(given, "ndim", 0) == 0:
        share = float(given)
        if not 0 < share <= 1:
            raise InputError(
                f"layer {share} is written as a share of the depth, which lies in (0, 1]; write layer numbers as "
                "integers, such as 3 or -2."
            )
        # The fraction that was meant: 0.29 of 50 blocks is 14.5, of which binary floats make 14.499999999999998.
        return max(1, math.floor(Fraction(share).limit_denominator(10**6) * num_blocks + Fraction(1, 2)))
    number = None
    # A boolean counts as an integer in Python, but a mask of layers is no list of their numbers.
    if "bool" not in kind:
        with suppress(TypeError):
            number = operator.index(given)
    if number is None:
        raise InvalidTypeError(
            f"layers must be numbers, got {given!r}; write integers, or shares of the depth in (0, 1], for example "
            "(3, 8, -2) or (0.25, 0.5, -2)."
        )
    layer = number + num_blocks + 1 if number < 0 else number
    if not 0 <= layer <= num_blocks:
        raise InputError(
            f"layer {number} is outside this backbone ({num_blocks} blocks: 0 = embeddings, 1..{num_blocks}, "
            f"or -{num_blocks + 1}..-1)."
        )
    return layer


def spread(num_layers: int) -> Callable[[int], tuple[int, ...]]:
    """Return a choice of L layers that lie evenly over the depth and end at the penultimate block, for any ``layers=``.

    The penultimate block is the deepest that LLaVA reads (arXiv:2310.03744); of 12 blocks, ``spread(4)`` is layers (3,
    6, 8, 11).

    Raises:
        ValueError: if ``num_layers`` is less than 1, or, once the depth is known, more than the blocks before the last.
    """
    if num_layers < 1:
        raise InputError(f"spread({num_layers}) names no layer; give at least 1.")
    return partial(_spread, num_layers)


def _spread(num_layers: int, num_blocks: int) -> tuple[int, ...]:
    last = num_blocks - 1
    if num_layers > last:
        raise InputError(
            f"spread({num_layers}) needs {num_layers} layers up to the penultimate block, and {num_blocks} blocks have "
            f"{last}; ask for at most so many, or name the layers."
        )
    return tuple((2 * place * last + num_layers) // (2 * num_layers) for place in range(1, num_layers + 1))
