"""Write the embedded data set to disk, in LLaVA's own format.

folder/
  settings.json            what it was made from
  images/                  train_000000.png …, val_000000.png …, test_000000.png …
  pretrain.json            one dense caption a training image (stage `pretrain`)
  train.json               one conversation of many short questions a training image (stage `finetune`)
  val.jsonl, test.jsonl    one question a line: question_id, image, text, kind, answer
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from layerfuse.errors import InputError

from .photographs import SPLITS
from .questions import KINDS, Question, conversation, questions_of_kind
from .rendering import render
from .scene import Scene, sample_scene
from .writing import DENSE_CAPTION_PROMPT, dense_caption

__all__ = ["make_dataset", "scene_at"]

# Raised whenever the same seed starts to mean other pictures or words.
_VERSION = 3


def scene_at(seed: int, split: str, index: int) -> Scene:
    """Return scene number `index` of a split; every image has a random stream of its own."""
    return sample_scene(_rng(seed, split, index, purpose=0), split)


def make_dataset(
    folder: str | Path, *, seed: int = 0, num_train: int = 2000, num_val: int = 50, num_test: int = 100
) -> Path:
    """Make the data set, unless the folder already holds it with the same settings.

    The folder appears whole or not at all: it is written beside its place and then renamed.

    Args:
        folder: where to write.
        seed: of scenes, questions and noise.
        num_train: training images; one caption and one conversation each.
        num_val: validation images; one question of each kind each.
        num_test: test images; one question of each kind each.

    Returns:
        The folder.

    Raises:
        ValueError: if a number of images is smaller than one, or the folder holds something else.
    """
    folder = Path(folder)
    counts = {"train": num_train, "val": num_val, "test": num_test}
    for split, count in counts.items():
        if count < 1:
            raise InputError(f"num_{split} is {count}; every split needs at least 1 image")
    settings = {"version": _VERSION, "seed": seed, **{f"num_{split}": counts[split] for split in SPLITS}}
    if folder.exists():
        if _read_settings(folder) == settings:
            return folder
        if not (folder / "settings.json").is_file() and any(folder.iterdir()):
            raise InputError(
                f"{folder} is not empty and was not made by make_dataset; give another folder, or empty it"
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write(scratch, settings, counts, seed)
        # mkdtemp makes folders private to the user; data is shared like any other file.
        scratch.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _write(folder: Path, settings: dict[str, int], counts: dict[str, int], seed: int) -> None:
    """Write images, then questions, then the settings that declare the folder complete."""
    (folder / "images").mkdir()
    pretrain: list[dict[str, Any]] = []
    train: list[dict[str, Any]] = []
    for index, name, scene in _images(folder, "train", counts["train"], seed):
        pretrain.append(_record(index, name, [(DENSE_CAPTION_PROMPT, dense_caption(scene))]))
        turns = conversation(scene, _rng(seed, "train", index, purpose=1))
        train.append(_record(index, name, [(turn.text, turn.answer) for turn in turns]))
    (folder / "pretrain.json").write_text(json.dumps(pretrain, indent=1), encoding="utf-8")
    (folder / "train.json").write_text(json.dumps(train, indent=1), encoding="utf-8")
    for split in ("val", "test"):
        rows: list[str] = []
        for index, name, scene in _images(folder, split, counts[split], seed):
            for question in _one_of_each(scene, _rng(seed, split, index, purpose=1)):
                rows.append(json.dumps(_row(len(rows), name, question)) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "settings.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _images(folder: Path, split: str, count: int, seed: int) -> Iterator[tuple[int, str, Scene]]:
    """Draw and save the images of a split; yield number, file name and scene of each."""
    for index in tqdm(range(count), desc=f"{split} images", disable=None):
        scene = scene_at(seed, split, index)
        name = f"{split}_{index:06d}.png"
        render(scene).save(folder / "images" / name)
        yield index, name, scene


def _record(index: int, image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """Return one sample of LLaVA's training format; the image token stands in the first message."""
    conversations: list[dict[str, str]] = []
    for number, (question, answer) in enumerate(turns):
        conversations.append({"from": "human", "value": question if number else f"<image>\n{question}"})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": f"{index:06d}", "image": image, "conversations": conversations}


def _one_of_each(scene: Scene, rng: np.random.Generator) -> Iterator[Question]:
    """Draw one question of every kind that the scene has one for."""
    for kind in KINDS:
        candidates = questions_of_kind(scene, kind)
        if candidates:
            yield candidates[int(rng.integers(len(candidates)))]


def _row(number: int, image: str, question: Question) -> dict[str, Any]:
    """Return one line of LLaVA's evaluation format, with kind and answer; boxes as four numbers."""
    answer: str | list[float] = question.answer if question.box is None else list(question.box)
    return {"question_id": number, "image": image, "text": question.text, "kind": question.kind, "answer": answer}


def _rng(seed: int, split: str, index: int, *, purpose: int) -> np.random.Generator:
    """Return the random stream of one image: 0 for its scene, 1 for its questions."""
    return np.random.default_rng([seed, SPLITS.index(split), index, purpose])


def _read_settings(folder: Path) -> dict[str, Any] | None:
    """Return the settings that a folder was made from; None where there are none."""
    path = folder / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
