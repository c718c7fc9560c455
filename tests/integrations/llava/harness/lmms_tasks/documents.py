"""What the tasks of this folder ask: rows of a file `questions.jsonl` in the folder where lmms-eval runs."""

from __future__ import annotations

from typing import Any

from PIL import Image


def pictures(document: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(name).convert("RGB") for name in document["images"]]


def messages(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Paths instead of images, which are behind the words."""
    parts = [{"type": "text", "text": document["question"]}]
    return [{"role": "user", "content": parts + [{"type": "image", "url": name} for name in document["images"]]}]


def question(document: dict[str, Any], **options: Any) -> str:
    return str(document["question"])


def choices(document: dict[str, Any]) -> list[str]:
    return list(document["choices"])


def likeliest(document: dict[str, Any]) -> int:
    return int(document["likeliest"])


def right(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"right": float(results[0] == document["answer"])}


def right_behind(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"right": float(results[0] == document["answer_behind"])}
