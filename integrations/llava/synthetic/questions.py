"""Questions about a scene, each with one exact answer, and the caption.

Kinds: `ocr` (what late layers of a backbone lose first), `counting`, `color`, `shape`, `box` (a tight box
in LLaVA's form: `[x1, y1, x2, y2]`, fractions of the image's side with two decimals).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from layerfuse.errors import InputError

from .scene import SHAPES, Scene

__all__ = ["CAPTION_PROMPT", "KINDS", "SceneQuestion", "caption", "conversation", "format_box", "questions_of_kind"]

CAPTION_PROMPT = "Describe the image."


@dataclass(frozen=True)
class SceneQuestion:
    """A question about one scene: its kind, of `KINDS`, its text, and the answer as the model should write it.

    Attributes:
        box: for kind `box`, the exact box (x1, y1, x2, y2) as fractions of the side; else None.
    """

    kind: str
    text: str
    answer: str
    box: tuple[float, float, float, float] | None = None


def format_box(box: tuple[float, float, float, float]) -> str:
    """Write a box in LLaVA's form, two decimals each."""
    return "[" + ", ".join(f"{value:.2f}" for value in box) + "]"


def caption(scene: Scene) -> str:
    """Describe a scene in one line: photograph, objects in reading order, text."""
    items = [f"a {item.size} {item.color} {item.shape}" for item in scene.objects]
    return f"{scene.photograph} in the background, {', '.join(items)}, the text {scene.text.string}"


KINDS = ("ocr", "counting", "color", "shape", "box")
"""Kinds of questions, in the order in which tables show them."""

QUESTIONS_PER_IMAGE: Mapping[str, int] = MappingProxyType({"ocr": 1, "counting": 3, "color": 2, "shape": 2, "box": 2})
"""Most questions of each kind in one training conversation."""


def questions_of_kind(scene: Scene, kind: str) -> list[SceneQuestion]:
    """Return every question of a kind that the scene answers without ambiguity; may be empty for `color`.

    Raises:
        ValueError: if the kind is not one of `KINDS`.
    """
    if kind not in KINDS:
        raise InputError(f"question kind {kind!r} is unknown; known: {', '.join(KINDS)}")
    return [question for question in _all_questions(scene) if question.kind == kind]


def _all_questions(scene: Scene) -> Iterator[SceneQuestion]:
    yield SceneQuestion("ocr", "What does the text say?", scene.text.string)
    yield SceneQuestion("counting", "How many objects are there?", str(len(scene.objects)))
    counts = Counter(item.shape for item in scene.objects)
    for shape in SHAPES:
        plural = f"{shape}es" if shape.endswith("s") else f"{shape}s"
        yield SceneQuestion("counting", f"How many {plural} are there?", str(counts[shape]))
    for item in scene.objects:
        # "the circle" names an object only where there is one circle.
        if counts[item.shape] == 1:
            yield SceneQuestion("color", f"What color is the {item.shape}?", item.color)
        yield SceneQuestion("shape", f"What shape is the {item.color} object?", item.shape)
        yield SceneQuestion("box", f"Where is the {item.color} {item.shape}?", format_box(item.box), item.box)


def conversation(scene: Scene, rng: np.random.Generator) -> list[SceneQuestion]:
    """Draw the questions of one training conversation: up to ten, of all kinds, in random order."""
    chosen: list[SceneQuestion] = []
    for kind, most in QUESTIONS_PER_IMAGE.items():
        candidates = questions_of_kind(scene, kind)
        chosen += [candidates[i] for i in rng.permutation(len(candidates))[:most]]
    return [chosen[i] for i in rng.permutation(len(chosen))]
