"""The same samples written in every form of data."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from integrations.llava.data import ConversationDataset, read_samples, survey_samples
from integrations.llava.image_layout import FixedLayout
from integrations.llava.prompts import TextEncoder, get_template
from layerfuse.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from tests.integrations.llava.tiny_parts import human_and_gpt, make_tokenizer

__all__ = ["FORMS", "asked", "dataset", "found", "samples_about", "tar_of", "write_hub_folder", "write_table"]

Rows = Sequence[Mapping[str, Any]]


def asked(sample: Mapping[str, Any]) -> tuple[str, str]:
    """Question, without tag, and answer of a sample of one turn about an image."""
    human, gpt = sample["conversations"]
    return human["value"].removeprefix("<image>\n"), gpt["value"]


def as_json(samples: Rows, images: Path, target: Path) -> Path:
    (target / "data.json").write_text(json.dumps(list(samples)), encoding="utf-8")
    return target / "data.json"


def as_messages(samples: Rows, images: Path, target: Path) -> Path:
    rows = []
    for sample in samples:
        question, answer = asked(sample)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"id": sample["id"], "messages": turns, "images": [sample["image"]]}) + "\n")
    (target / "data.jsonl").write_text("".join(rows), encoding="utf-8")
    return target / "data.jsonl"


def _with_bytes(samples: Rows, images: Path) -> list[dict[str, Any]]:
    return [
        {**sample, "image": {"bytes": (images / sample["image"]).read_bytes(), "path": sample["image"]}}
        for sample in samples
    ]


def write_table(rows: Sequence[Mapping[str, Any]], path: Path, **options: Any) -> Path:
    """Write rows as parquet, ten a group unless it is said otherwise."""
    parquet.write_table(pa.Table.from_pylist(list(rows)), path, **({"row_group_size": 10} | options))
    return path


def as_parquet(samples: Rows, images: Path, target: Path) -> Path:
    return write_table(_with_bytes(samples, images), target / "data.parquet")


def write_hub_folder(rows: Rows, folder: Path) -> Path:
    """What `save_to_disk` of Hugging Face's datasets leaves, in two files."""
    folder.mkdir()
    half, names = len(rows) // 2, ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (rows[:half], rows[half:]), strict=True):
        table = pa.Table.from_pylist(list(part))
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def as_hub_folder(samples: Rows, images: Path, target: Path) -> Path:
    return write_hub_folder(_with_bytes(samples, images), target / "saved")


def tar_of(members: Sequence[tuple[str, bytes]], path: Path) -> Path:
    """Write members in their order."""
    with tarfile.open(path, "w") as opened:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return path


def as_tar(samples: Rows, images: Path, target: Path) -> Path:
    members = []
    for index, sample in enumerate(samples):
        picture = images / sample["image"]
        members += [
            (f"./{index:06}{picture.suffix}", picture.read_bytes()),
            (f"./{index:06}.json", json.dumps(sample).encode()),
        ]
    return tar_of(members, target / "data.tar")


def as_folder(samples: Rows, images: Path, target: Path) -> Path:
    folder = target / "folder"
    (folder / "images").mkdir(parents=True)
    with (folder / "samples.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "question", "answer"])
        for sample in samples:
            (folder / "images" / sample["image"]).write_bytes((images / sample["image"]).read_bytes())
            table.writerow([sample["id"], sample["image"], *asked(sample)])
    return folder


FORMS: Mapping[str, Callable[[Rows, Path, Path], Path]] = {
    "json": as_json,
    "messages": as_messages,
    "parquet": as_parquet,
    "hub": as_hub_folder,
    "tar": as_tar,
    "folder": as_folder,
}
"""Writers of samples about one image, and of their images, into a folder: (samples, images, folder) -> path."""


def samples_about(folder: Path, count: int) -> list[dict[str, Any]]:
    """Samples of one turn, each about an image of its own, some of whose texts are awkward in a table."""
    random, made = np.random.default_rng(0), []
    for index in range(count):
        name = f"{index}.{('png', 'jpg')[index % 2]}"
        pixels = random.integers(0, 255, (8 + index % 5, 9 + index % 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        turns = human_and_gpt(
            f'<image>\nWhat, "{index}"?\nSay it.', f"Number {index}; it's grün,\n{'very ' * (index % 4)}much."
        )
        made.append({"id": f"s{index}", "image": name, "conversations": turns})
    return made


def dataset(samples: Any, folder: Path, **options: Any) -> ConversationDataset:
    return ConversationDataset(
        samples,
        image_folder=folder,
        template=get_template("v1"),
        encoder=TextEncoder(make_tokenizer("llama")),
        preprocessing=Preprocessing(size=(12, 12), mean=CLIP_MEAN, std=CLIP_STD, mode="pad"),
        layout=FixedLayout(999, 4),
        **options,
    )


def found(path: Any, folder: Path, **options: Any) -> list[tuple[str, str, str]]:
    """Kind, place and message of what the doctor finds."""
    survey = survey_samples(
        read_samples(path),
        image_folder=folder,
        template=get_template("v1"),
        workers=1,
        **{"check_images": "decode"} | options,
    )
    return [(finding.kind, finding.place, finding.message) for finding in survey.findings]
