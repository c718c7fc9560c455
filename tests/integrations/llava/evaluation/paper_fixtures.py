"""A few made-up questions of each of the paper's benchmarks, in its published layout: what `Task.load` reads."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."

MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
OCRBENCH_TYPES = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)


def picture(width: int = 12, height: int = 9, color: str = "red", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, kind)
    return file.getvalue()


def write_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(kind="PNG" if path.suffix == ".png" else "JPEG"))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_vqav2(folder: Path) -> None:
    rows = [
        {
            "question_id": own,
            "image": f"COCO_test2015_{own:012d}.jpg",
            "text": f"What is {own}?{SHORT}",
            "category": "d",
        }
        for own in (262144000, 262144001, 262144002, 262144003)
    ]
    write_lines(folder / "vqav2/llava_vqav2_mscoco_test2015.jsonl", rows)
    write_lines(folder / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", [rows[2], rows[0]])
    for row in (rows[0], rows[2]):
        write_picture(folder / "vqav2/test2015" / row["image"])


def write_gqa(folder: Path) -> None:
    asked = [("201", "n1.jpg", "Is it overcast?"), ("202", "n1.jpg", "Who is it?"), ("203", "n2.jpg", "What is red?")]
    write_lines(
        folder / "gqa/llava_gqa_testdev_balanced.jsonl",
        [{"question_id": own, "image": name, "text": text + SHORT, "category": "default"} for own, name, text in asked],
    )
    answers = {"201": ("no", "verify"), "202": ("girl", "query"), "203": ("t-shirt", "query"), "204": ("x", "query")}
    content = {
        own: {"imageId": "n", "question": "?", "answer": answer, "types": {"structural": kind, "semantic": "rel"}}
        for own, (answer, kind) in answers.items()
    }
    write_json(folder / "gqa/data/testdev_balanced_questions.json", content)
    for name in ("n1.jpg", "n2.jpg"):
        write_picture(folder / "gqa/data/images" / name)


def write_vizwiz(folder: Path) -> None:
    names = [f"VizWiz_test_{own:08d}.jpg" for own in range(2)]
    texts = ["WHAT is this?", "what color?"]
    rows = [
        {"question_id": name, "image": name, "text": text + UNANSWERABLE + SHORT, "category": "default"}
        for name, text in zip(names, texts, strict=True)
    ]
    write_lines(folder / "vizwiz/llava_test.jsonl", rows)
    for name in names:
        write_picture(folder / "vizwiz/test" / name)


def write_scienceqa(folder: Path) -> None:
    problems = {
        "4": {"question": "Which bird?", "choices": ["gull", "owl"], "answer": 1, "hint": "", "image": "image.png"},
        "5": {
            "question": "How many?",
            "choices": ["1", "2", "3"],
            "answer": 0,
            "hint": "See it.",
            "image": "image.png",
        },
        "6": {"question": "Which?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": "image.png"},
        "7": {"question": "No image?", "choices": ["a", "b"], "answer": 0, "hint": "", "image": None},
    }
    rows: list[dict[str, Any]] = []
    for key, own in problems.items():
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip("ABC", own["choices"], strict=False))  # type: ignore[call-overload]
        text = f"Context: {own['hint'] or 'N/A'}\nQuestion: {own['question']}\nOptions: {options}"
        shown = {"image": f"{key}/image.png"} if own["image"] else {}
        human = {"from": "human", "value": f"{text}\n<image>" if shown else text}
        rows.append({"id": key, **shown, "conversations": [human, {"from": "gpt", "value": "A"}]})
        if shown:
            write_picture(folder / "scienceqa/images/test" / key / "image.png")
    write_json(folder / "scienceqa/llava_test_CQM-A.json", rows)
    write_json(folder / "scienceqa/problems.json", problems)
    write_json(folder / "scienceqa/pid_splits.json", {"test": list(problems)})


def write_textvqa(folder: Path) -> None:
    data = [
        ("0a", 34602, "what is the Brand?", ["dakota"] * 4 + ["nous les gosses"] * 6),
        ("0a", 34603, "What time?", ["3:45"] * 3 + ["a quarter to 4"] * 7),
        ("0b", 34604, "is it open?", ["yes"] * 10),
    ]
    rows = [
        {"image_id": image, "question_id": own, "question": text, "answers": people, "image_classes": []}
        for image, own, text, people in data
    ]
    write_json(folder / "textvqa/TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    tokens = ["\nReference OCR token: DAKOTA, DIGITAL", "", "\nReference OCR token: OPEN"]
    asked = [
        {"question_id": image, "image": f"{image}.jpg", "text": text + read + SHORT}
        for (image, _, text, _), read in zip(data, tokens, strict=True)
    ]
    write_lines(folder / "textvqa/llava_textvqa_val_v051_ocr.jsonl", asked)
    for name in ("0a.jpg", "0b.jpg"):
        write_picture(folder / "textvqa/train_images" / name)


def write_pope(folder: Path) -> None:
    labels = {
        "adversarial": ["yes", "no", "yes", "no"],
        "popular": ["yes", "no", "yes", "no"],
        "random": ["yes", "yes", "no", "no"],
    }
    rows = []
    for category, own in labels.items():
        shown = [f"COCO_val2014_{number:012d}.jpg" for number in range(len(own))]
        for number, name in enumerate(shown):
            text = f"Is there a {number} in the image?"
            asked = {"question_id": len(rows), "image": name, "text": text + SHORT, "category": category}
            rows.append(asked)
            write_picture(folder / "pope/val2014" / name)
        write_lines(
            folder / f"pope/coco/coco_pope_{category}.json",
            [
                {"question_id": number + 1, "image": name, "text": f"Is there a {number} in the image?", "label": label}
                for number, (name, label) in enumerate(zip(shown, own, strict=True))
            ],
        )
    write_lines(folder / "pope/llava_pope_test.jsonl", rows)


def write_mme(folder: Path) -> None:
    """One image a sub-task, `count` two; some sub-tasks keep images and texts apart, some texts have two blanks."""
    data = folder / "MME/MME_Benchmark_release_version"
    rows = []
    for category in (*MME_PERCEPTION, *MME_COGNITION):
        apart = category in ("posters", "celebrity", "scene", "landmark", "artwork")
        for number in range(2 if category == "count" else 1):
            stem = f"{number:04d}"
            image = f"{category}/images/{stem}.jpg" if apart else f"{category}/{stem}.jpg"
            write_picture(data / image)
            texts = data / category / "questions_answers_YN" if apart else data / category
            texts.mkdir(parents=True, exist_ok=True)
            blanks = "  " if category == "OCR" else " "
            pair = [(f"Is it {stem}?", "Yes"), (f"Is it not {stem}?", "No")]
            lines = [f"{question}{blanks}Please answer yes or no.\t{answer}" for question, answer in pair]
            (texts / f"{stem}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            for question, _ in pair:
                own = {"question_id": f"{category}/{stem}.jpg", "image": image, "category": category}
                rows.append({**own, "text": question + SHORT})
    write_lines(folder / "MME/llava_mme.jsonl", rows)


def write_ocrbench(folder: Path) -> None:
    rows = []
    for number, kind in enumerate(OCRBENCH_TYPES):
        dataset = "HME100k" if "Mathematical" in kind else f"set{number}"
        answers: Any = ["A \\frac { 1 }"] if dataset == "HME100k" else [f"Word {number}", "other"]
        name = f"{dataset}/{number}.jpg"
        row = {"dataset_name": dataset, "id": 3, "question": f"what is written {number}? ", "image_path": name}
        rows.append({**row, "type": kind, "answers": answers if number else "Word 0"})
        write_picture(folder / "OCRBench/OCRBench_Images" / name)
    write_json(folder / "OCRBench/OCRBench.json", rows)


def refcoco_rows() -> list[dict[str, Any]]:
    """Rows of a split; one image wider than high, one square, one expression more than images."""
    wide = {"bytes": picture(200, 100, "blue"), "path": None}
    square = {"bytes": picture(80, 80, "green"), "path": None}
    common = {"question": "Please carefully observe the area circled", "segmentation": [0.0], "iscrowd": 0}
    return [
        {"question_id": "9", "image": wide, "answer": ["a man", "left one"], "bbox": [20.0, 0.0, 80.0, 30.0], **common},
        {"question_id": "9", "image": square, "answer": ["the green"], "bbox": [0.0, 0.0, 40.0, 80.0], **common},
    ]


def write_refcoco(folder: Path) -> None:
    """Every split of all three; needs pyarrow."""
    import pyarrow
    from pyarrow import parquet

    rows = refcoco_rows()
    splits = {
        "RefCOCO": ("val", "testA", "testB"),
        "RefCOCOplus": ("val", "testA", "testB"),
        "RefCOCOg": ("val", "test"),
    }
    for name, own in splits.items():
        for split in own:
            path = folder / name / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "vqav2": write_vqav2,
    "gqa": write_gqa,
    "vizwiz": write_vizwiz,
    "scienceqa": write_scienceqa,
    "textvqa": write_textvqa,
    "pope": write_pope,
    "mme": write_mme,
    "ocrbench": write_ocrbench,
}


def write_all(folder: Path) -> None:
    """Write all benchmarks of this module; RefCOCO's where pyarrow is installed."""
    for write in WRITERS.values():
        write(folder)
    try:
        write_refcoco(folder)
    except ModuleNotFoundError:
        return
