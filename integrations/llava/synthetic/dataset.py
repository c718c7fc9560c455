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
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from layerfuse.errors import ExistingFileError, InputError, MissingFileError
from layerfuse.files import atomic_folder

from .captions import DENSE_CAPTION_PROMPT, dense_caption
from .photographs import SPLITS
from .questions import KINDS, conversation, questions_of_kind
from .rendering import draw_scene
from .scene import Scene, sample_scene

__all__ = ["made_from", "make_dataset", "scene_at"]

# Raised whenever the same seed starts to mean other pictures or words.
_VERSION = 3
_SETTINGS, _IMAGES = "settings.json", "images"
_FILES = (_SETTINGS, "pretrain.json", "train.json", "val.jsonl", "test.jsonl")
_IMAGE = re.compile(rf"({'|'.join(SPLITS)})_\d{{6,}}\.png")


def scene_at(seed: int, split: str, index: int) -> Scene:
    """Return scene number `index` of a split; every image has a random stream of its own."""
    return sample_scene(_rng(seed, split, index, purpose=0), split)


def make_dataset(
    folder: str | Path,
    *,
    seed: int = 0,
    num_train: int = 2000,
    num_val: int = 50,
    num_test: int = 100,
    renew: bool = False,
) -> Path:
    """Make the data set in a folder, unless that holds it with the same settings; the folder is returned.

    It is written aside and takes the place of an earlier one when it is whole. A folder that holds anything that this
    function does not write is left alone.

    Args:
        folder: where to write.
        seed: of scenes, questions and noise.
        num_train: training images; one caption and one conversation each.
        num_val: validation images; one question of each kind each.
        num_test: test images; one question of each kind each.
        renew: make it anew also where the settings are the same.

    Raises:
        ValueError: if a number of images is smaller than one.
        FileExistsError: if the folder holds something else.
    """
    folder = Path(folder)
    counts = {"train": num_train, "val": num_val, "test": num_test}
    for split, count in counts.items():
        if count < 1:
            raise InputError(f"num_{split} is {count}; every split needs at least 1 image")
    settings = {"version": _VERSION, "seed": seed, **{f"num_{split}": counts[split] for split in SPLITS}}
    images = {_image_name(split, index) for split, count in counts.items() for index in range(count)}
    if not renew and _read_settings(folder / _SETTINGS) == settings and _is_whole(folder, images):
        return folder
    _refuse_foreign(folder)
    with atomic_folder(folder) as scratch:
        _write(scratch, settings, counts, seed)
    for path in (folder / _IMAGES).iterdir():
        if path.name not in images and _IMAGE.fullmatch(path.name):
            path.unlink()
    return folder


def made_from(folder: str | Path) -> dict[str, int]:
    """Return what a data set was made from: ``seed``, ``num_train``, ``num_val`` and ``num_test``.

    Raises:
        FileNotFoundError: if the folder holds no data set of `make_dataset` whose scenes `scene_at` still draws.
    """
    noted = _read_settings(Path(folder) / _SETTINGS)
    if noted is None or noted.pop("version") != _VERSION:
        raise MissingFileError(f"{folder} holds no data set that this version makes; make one with make_dataset.")
    return noted


def _is_whole(folder: Path, images: set[str]) -> bool:
    """Whether no file is missing; a replacement that was killed may have moved some already."""
    if not all((folder / name).is_file() for name in _FILES) or not (folder / _IMAGES).is_dir():
        return False
    return images <= {path.name for path in (folder / _IMAGES).iterdir()}


def _image_name(split: str, index: int) -> str:
    return f"{split}_{index:06d}.png"


def _refuse_foreign(folder: Path) -> None:
    """Make sure that nothing is replaced which `make_dataset` cannot be shown to have written."""
    if not folder.is_dir():
        if folder.exists():
            raise ExistingFileError(f"{folder} is a file; give a folder for the data set.")
        return
    # A save that was killed leaves folders of its own, with the settings in one of them.
    entries = [path for path in folder.iterdir() if not path.name.startswith((".saving-", ".replaced-"))]
    images = (folder / _IMAGES).iterdir() if (folder / _IMAGES).is_dir() else ()
    foreign = [path for path in entries if path.name not in (*_FILES, _IMAGES)]
    foreign += [path for path in images if not _IMAGE.fullmatch(path.name)]
    noted = [_read_settings(path) for path in (folder / _SETTINGS, *folder.glob(f".*/{_SETTINGS}"))]
    if not foreign and entries and not any(noted):
        foreign = entries
    if foreign:
        names = ", ".join(sorted(path.relative_to(folder).as_posix() for path in foreign)[:3])
        raise ExistingFileError(
            f"{folder} holds {names}, which make_dataset did not write, so nothing in it is replaced; give another "
            "folder, or move that away."
        )


def _write(folder: Path, settings: dict[str, int], counts: dict[str, int], seed: int) -> None:
    """Write images, then questions, then the settings that declare the folder complete."""
    (folder / _IMAGES).mkdir()
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
            for row in _rows(name, scene, _rng(seed, split, index, purpose=1)):
                rows.append(json.dumps({"question_id": len(rows), **row}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")


def _images(folder: Path, split: str, count: int, seed: int) -> Iterator[tuple[int, str, Scene]]:
    """Draw and save the images of a split; yield number, file name and scene of each."""
    for index in tqdm(range(count), desc=f"{split} images", disable=None):
        scene = scene_at(seed, split, index)
        name = _image_name(split, index)
        draw_scene(scene).save(folder / _IMAGES / name)
        yield index, name, scene


def _record(index: int, image: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    """Return one sample of LLaVA's training format; the image token stands in the first message."""
    conversations: list[dict[str, str]] = []
    for question, answer in turns:
        tag = "" if conversations else "<image>\n"
        conversations += [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]
    return {"id": f"{index:06d}", "image": image, "conversations": conversations}


def _rows(image: str, scene: Scene, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """LLaVA's evaluation format with kind and answer, boxes as four numbers: a question of every kind that there is."""
    for kind in KINDS:
        if candidates := questions_of_kind(scene, kind):
            question = candidates[int(rng.integers(len(candidates)))]
            answer = question.answer if question.box is None else list(question.box)
            yield {"image": image, "text": question.text, "kind": kind, "answer": answer}


def _rng(seed: int, split: str, index: int, *, purpose: int) -> np.random.Generator:
    """Return the random stream of one image: 0 for its scene, 1 for its questions."""
    return np.random.default_rng([seed, SPLITS.index(split), index, purpose])


def _read_settings(path: Path) -> dict[str, Any] | None:
    """Return the settings that a data set was made from; None where the file holds no settings of ours."""
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = {"version", "seed", *(f"num_{split}" for split in SPLITS)}
    return noted if isinstance(noted, dict) and set(noted) == ours else None
