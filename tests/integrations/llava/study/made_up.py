"""Made-up results with every part of a report in them."""

from __future__ import annotations

import math
import random

import numpy as np

from integrations.llava.evaluation import Question, ScoredAnswer, score_answers, summarise
from integrations.llava.study.results import DemoResults, Example, Figure, FuserRun, Panel, PhotoAnswer, Probe
from layerfuse.analysis import png_bytes

KINDS = ("ocr", "counting", "color", "shape", "box")
_RIGHT: dict[str, str | tuple[float, ...]] = {
    "ocr": "K7F",
    "counting": "3",
    "color": "red",
    "shape": "ring",
    "box": (0.25, 0.5, 0.375, 0.625),
}
_WRITTEN = {**_RIGHT, "box": "[0.25, 0.50, 0.37, 0.62]"}


def make_questions(num_images: int = 20) -> list[Question]:
    return [
        Question(len(KINDS) * image + number, f"test_{image}.png", f"Question about {kind}?", kind, _RIGHT[kind])
        for image in range(num_images)
        for number, kind in enumerate(KINDS)
    ]


def make_answers(skill: float, seed: int, *, num_images: int = 20) -> list[ScoredAnswer]:
    draw = random.Random(f"{skill} {seed}")
    questions = make_questions(num_images)
    rows = [
        {
            "question_id": q.question_id,
            "prediction": _WRITTEN[q.kind] if draw.random() < skill else "[0.1, 0.1, 0.3, 0.3]",
        }
        for q in questions
    ]
    return score_answers(questions, rows)


def make_run(fuser: str, seed: int, skill: float, *, steps: int = 120) -> FuserRun:
    answers = make_answers(skill, seed)
    draw = random.Random(seed)
    curve = [(step, 0.4 + 3 * math.exp(-step / 30) + 0.2 * draw.random()) for step in range(1, steps + 1)]
    return FuserRun(
        fuser=fuser,
        seed=seed,
        folder=f"runs/demo/{fuser}-seed{seed}",
        layers=(5,) if fuser == "select" else (1, 2, 3, 4, 5),
        kinds=summarise(answers),
        answers=answers,
        losses={"pretrain": curve, "finetune": [(step, loss / 2) for step, loss in curve]},
        seconds={"pretrain": 40.0, "finetune": 80.5, "evaluation": 9.25},
        cost={
            "parameters": 0 if fuser == "select" else 45_600,
            "num_tokens": 64,
            "out_channels": 96,
            "flops": 1_234_567,
        },
    )


def make_results(
    skills: dict[str, float] | None = None, *, seeds: tuple[int, ...] = (0,), complete: bool = True
) -> DemoResults:
    """Results of fusers with a given share of right answers."""
    skills = skills or {"select": 0.5, "mmfuser": 0.6}
    runs = [make_run(fuser, seed, skill) for fuser, skill in skills.items() for seed in seeds]
    chance = {"ocr": 0.0, "counting": 0.35, "color": 0.2, "shape": 0.25, "box": 0.01}
    if not complete:
        return DemoResults(runs=runs, chance=chance)
    noise = np.random.default_rng(0)
    picture = png_bytes(noise.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    answers = {run.fuser: run.answers for run in runs if run.seed == seeds[0]}
    return DemoResults(
        runs=runs,
        chance=chance,
        probes=[
            Probe(
                title="character in the cell",
                num_cells=300,
                chance=0.06,
                layers={layer: 0.9 - 0.02 * layer**2 for layer in range(7)},
                fusers={fuser: 0.5 + skill / 4 for fuser, skill in skills.items()},
            ),
            Probe("colour in the cell", 310, 0.2, {layer: 0.5 + 0.05 * layer for layer in range(7)}),
        ],
        figures=[
            Figure(
                kind, f"{kind} of test images", [Panel("the scene", picture), Panel("layer 1", picture, under=picture)]
            )
            for kind in ("layers", "layers", "readings", "shares", "points")
        ],
        examples=[
            Example(
                f"test_{index}.png",
                picture,
                {fuser: [a for a in own if a.question.image == f"test_{index}.png"] for fuser, own in answers.items()},
            )
            for index in range(3)
        ],
        facts={"training images": "2 000", "steps": "500 + 1 500", "backbone": "6 blocks, width 96"},
        origin={"command": "python -m integrations.llava demo", "commit": "abc1234", "hardware": "2 CPU cores"},
        seconds={"data": 12.0, "probe": 3.0},
        photo=PhotoAnswer("photo.jpg", picture, "What is <this>?", {"select, seed 0": "a ring"}),
    )
