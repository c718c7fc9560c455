"""Whether channels can be split over attention heads."""

from __future__ import annotations

from layerfuse.errors import InputError

__all__ = ["check_heads"]


def check_heads(channels: int, num_heads: int) -> None:
    """Check that heads take equal slices of the channels.

    Args:
        channels: C.
        num_heads: M.

    Raises:
        ValueError: if there is no head, or the heads do not divide the channels.
    """
    if num_heads < 1:
        raise InputError(f"num_heads is {num_heads}; expected at least 1.")
    if channels % num_heads:
        allowed = [count for count in range(1, channels + 1) if channels % count == 0]
        raise InputError(
            f"{channels} channels cannot be split evenly over {num_heads} heads; num_heads must be one of "
            f"{', '.join(map(str, allowed))}."
        )
