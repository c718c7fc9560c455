"""Texts, numbers and boxes read out of answers, for scorers to compare."""

from __future__ import annotations

from .boxes import parse_box

__all__ = ["parse_box"]
