"""Lists in messages: of many entries the first, and how many more there are."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["bulleted", "listed"]

_MOST = 20


def listed(names: Sequence[str], *, most: int | None = _MOST) -> str:
    """Write names into a sentence; "none" if there are none.

    Args:
        names: in order.
        most: that are written; None writes all.
    """
    return ", ".join(_first(names, most)) or "none"


def bulleted(entries: Sequence[object]) -> str:
    """Write entries below a sentence, each on its own line, the first 20 of them."""
    return "".join(f"\n  {entry}" for entry in _first(entries, _MOST))


def _first(entries: Sequence[object], most: int | None) -> list[str]:
    shown = [str(entry) for entry in entries[:most]]
    left = len(entries) - len(shown)
    return [*shown, f"… and {left} more"] if left else shown
