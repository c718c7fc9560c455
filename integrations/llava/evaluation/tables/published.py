"""The numbers that papers report, from the file ``published.json``, each with its source.

The keys of numbers are a task, such as ``pope``; a task and one of its parts (``ocrbench:recognition``); or the mean
over a table (``comprehension:average``). What was not seen in a source is not in the file, and tables say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["SIZES", "PublishedModel", "PublishedNumber", "published_models"]

SIZES = ("7b", "13b")


@dataclass(frozen=True)
class PublishedNumber:
    """As printed (percent or points), with its source in words and what a reader has to know, or an empty text."""

    value: float
    source: str
    note: str


@dataclass(frozen=True)
class PublishedModel:
    """A model's numbers, all under one protocol.

    Attributes:
        name: for the column's head.
        size: of its language model, one of `SIZES`.
        protocol: how the numbers were made.
        numbers: by key.
    """

    name: str
    size: str
    protocol: str
    numbers: Mapping[str, PublishedNumber]


@cache
def published_models() -> tuple[PublishedModel, ...]:
    """All of the file, in its order."""
    content = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return tuple(
        PublishedModel(
            name=model["name"],
            size=model["size"],
            protocol=model["protocol"],
            numbers={
                key: PublishedNumber(value, content["sources"][part["source"]], model.get("notes", {}).get(key, ""))
                for part in model["scores"]
                for key, value in part["numbers"].items()
            },
        )
        for model in content["models"]
    )
