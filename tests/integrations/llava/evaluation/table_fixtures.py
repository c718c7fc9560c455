"""A few questions of MMBench, SEED-Bench, LLaVA-Bench, MM-Vet, MMMU, captions and of the benchmarks of detail.

All made up, in their published layouts; ``write_all(folder)`` writes what `Task.load` reads. `PARQUET` holds the rows
of those that are parquet, which pyarrow writes.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

LETTER = "\nAnswer with the option's letter from the given choices directly."
SHORT = "\nAnswer the question using a single word or phrase."
COLUMNS = (
    *(
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
    ),
    "split",
)

MMMU_SUBJECTS = (
    *("Accounting", "Agriculture", "Architecture_and_Engineering", "Art", "Art_Theory"),
    *("Basic_Medical_Science", "Biology", "Chemistry", "Clinical_Medicine", "Computer_Science", "Design"),
    *("Diagnostics_and_Laboratory_Medicine", "Economics", "Electronics", "Energy_and_Power", "Finance"),
    *("Geography", "History", "Literature", "Manage", "Marketing", "Materials", "Math"),
    *("Mechanical_Engineering", "Music", "Pharmacy", "Physics", "Psychology", "Public_Health"),
    "Sociology",
)


def picture(width: int = 12, height: int = 9, color: str = "red", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, kind)
    return file.getvalue()


def cell(color: str, width: int = 12, height: int = 9) -> dict[str, Any]:
    return {"bytes": picture(width, height, color), "path": None}


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def mmbench_rows(language: str = "en") -> list[dict[str, Any]]:
    """Three questions; of the first two the options also turned round, once and three times."""
    shown = base64.b64encode(picture()).decode()
    texts = {1: "Which is\nit?", 2: "What animal?", 3: 'Who says "hi"?'}
    options = {
        1: ["a cat", "a dog"],
        2: ["cow", "horse", "hen", "goose"],
        3: ["the man", "the boy", "None", "the girl"],
    }
    right = {1: "a dog", 2: "cow", 3: "the boy"}
    hints = {1: "", 2: "nan", 3: "Look closely."}
    ability = {1: "logic", 2: "perception", 3: "perception"}
    rows = []
    for index, own in options.items():
        for turn in range(1 if index == 3 else len(own)):
            turned = own[turn:] + own[:turn]
            letters = dict(zip("ABCD", [*turned, "", ""][:4], strict=True))
            answer = "ABCD"[turned.index(right[index])]
            about = {"category": "c", "source": "made up", "l2-category": ability[index], "comment": "", "split": "dev"}
            # A turned row names the one that holds its picture; so do some tables.
            image = shown if turn == 0 else str(index)
            own_index = index + 1_000_000 * turn
            text = texts[index] if language == "en" else "这是什么?"
            rows.append(
                {"index": own_index, "question": text, "hint": hints[index], **letters, "answer": answer, **about}
                | {"image": image}
            )
    return rows


def write_mmbench(folder: Path, name: str = "mmbench/mmbench_dev_20230712.tsv", language: str = "en") -> None:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(mmbench_rows(language))
    _write(folder / name, file.getvalue())


def write_mmbench_cn(folder: Path) -> None:
    write_mmbench(folder, "mmbench_cn/mmbench_dev_cn_20231003.tsv", "cn")


SEED_IMAGES = {11: "SEED-Bench-image/1_1", 12: "SEED-Bench-image/1_2", 13: "SEED-Bench-video-image/v_3.png"}


def write_seed_bench(folder: Path) -> None:
    """Three questions, of which the last is about a frame; ids are texts in one file, numbers in the other."""
    data = folder / "seed_bench"
    rows = [
        {"question_id": key, "image": name, "text": f"Which {key}?\nA. a\nB. b\nC. c\nD. d{LETTER}", "category": "x"}
        for key, name in SEED_IMAGES.items()
    ]
    questions = [
        {"question_id": str(key), "question": f"Which {key}?", "answer": right, "question_type_id": kind}
        | {"data_type": "video" if key == 13 else "image", "data_id": "1", **{f"choice_{one}": one for one in "abcd"}}
        for key, right, kind in ((11, "A", 1), (12, "B", 2), (13, "C", 10))
    ]
    types = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
    _write(data / "llava-seed-bench.jsonl", _lines(rows))
    _write(data / "SEED-Bench.json", json.dumps({"questions": questions, "question_type": types}))
    for name in SEED_IMAGES.values():
        _write(data / name, picture())


def write_llava_bench(folder: Path) -> None:
    data = folder / "llava-bench-in-the-wild"
    kinds = ["conv", "detail", "complex"]
    rows = [
        {"question_id": n, "image": f"{n // 2:03d}.jpg", "text": f"What of {n}?", "category": kind}
        for n, kind in enumerate(kinds)
    ]
    _write(data / "questions.jsonl", _lines(rows))
    captions = [{"id": "000", "image": "000.jpg", "caption": "A street."}]
    captions.append({"id": "001", "image": "001.jpg", "caption": ["A lake.", "A boat."]})
    _write(data / "context.jsonl", _lines(captions))
    references = [{"question_id": n, "text": f"Reference {n}.", "answer_id": str(n)} for n in (2, 0, 1)]
    _write(data / "answers_gpt4.jsonl", _lines(references))
    for name in ("000.jpg", "001.jpg"):
        _write(data / "images" / name, picture(kind="JPEG"))


def write_llava_rules(folder: Path) -> None:
    rules = {
        f"llava_bench_{kind}": {"role": "Assistant", "prompt": f"Rate {kind}."}
        for kind in ("conv", "detail", "complex")
    }
    _write(folder / "llava-bench-in-the-wild/rule.json", json.dumps(rules))


def write_mm_vet(folder: Path) -> None:
    data = folder / "mm-vet"
    rows = [{"question_id": n, "image": f"v1_{n}.png", "text": f"What is {n}?"} for n in range(3)]
    _write(data / "llava-mm-vet.jsonl", _lines(rows))
    answers = ["-1<AND>-5", "a<OR>b", "cat"]
    abilities = [["math", "ocr"], ["ocr"], ["rec"]]
    known = {
        f"v1_{n}": {
            "imagename": f"v1_{n}.png",
            "question": f"What is {n}?",
            "answer": answers[n],
            "capability": abilities[n],
        }
        for n in range(3)
    }
    _write(data / "mm-vet.json", json.dumps(known))
    for row in rows:
        _write(data / "images" / row["image"], picture())


def region_rows() -> list[dict[str, Any]]:
    common = {"question": "?", "iscrowd": 0, "file_name": "a.jpg"}
    box, outline = [4.0, 3.0, 10.0, 6.0], [2.0, 2.0, 16.0, 2.0, 9.0, 12.0]
    return [
        {
            "question_id": "1",
            "image": cell("blue", 20, 15),
            "answer": ["red ball"],
            "bbox": box,
            "segmentation": outline,
        }
        | common,
        {"question_id": "2", "image": cell("blue", 20, 15), "answer": ["blue ball", "the ball that is blue"]}
        | {"bbox": [0.0, 0.0, 5.0, 5.0], "segmentation": outline[2:] + outline[:2]}
        | common,
    ]


def _mmmu(own_id: str, question: str, options: list[str], answer: str, *colors: str) -> dict[str, Any]:
    shown = [cell(color) for color in colors]
    pictures = {f"image_{n}": shown[n - 1] if n <= len(shown) else None for n in range(1, 8)}
    kind = "multiple-choice" if options else "open"
    return {
        "id": own_id,
        "question": question,
        "options": repr(options),
        "answer": answer,
        "question_type": kind,
    } | pictures


_DOCS = [
    {"questionId": "7", "question": "What date?", "answers": ["May 3", "3 May"], "image": cell("white"), "docId": 1},
    {"questionId": "8", "question": "Whose?", "answers": ["ITC"], "image": cell("white"), "docId": 1},
]
_STARS = [
    (0, "A", "math", "geometry"),
    (1, "B", "math", "geometry"),
    (2, "C", "math", "statistical reasoning"),
    (3, "D", "coarse perception", "image emotion"),
]
PARQUET: dict[str, list[dict[str, Any]]] = {
    "chartqa/data/test-00000-of-00001.parquet": [
        {"type": "human_test", "question": "How many?", "answer": "14", "image": cell("red")},
        {"type": "human_test", "question": "Which?", "answer": "Blue", "image": cell("blue")},
        {"type": "augmented_test", "question": "What share?", "answer": "50%", "image": cell("red")},
    ],
    "docvqa/DocVQA/validation-00000-of-00001.parquet": _DOCS,
    "docvqa/DocVQA/test-00000-of-00001.parquet": [{**row, "answers": None} for row in _DOCS],
    "docvqa/InfographicVQA/validation-00000-of-00001.parquet": _DOCS,
    "docvqa/InfographicVQA/test-00000-of-00001.parquet": [{**row, "answers": None} for row in _DOCS],
    "ai2d/data/test-00000-of-00001.parquet": [
        {"question": "Which?", "options": ["egg", "larva", "moth"], "answer": "1", "image": cell("green")},
        {"question": "What?", "options": ["leaf", "root"], "answer": "0", "image": cell("green")},
    ],
    "mmstar/mmstar.parquet": [
        {"index": n, "question": f" Which {n}?\nOptions: A: a, B: b, C: c, D: d ", "image": picture(), "answer": right}
        | {"category": category, "l2_category": detailed, "meta_info": {"source": "made up"}}
        for n, right, category, detailed in _STARS
    ],
    **{
        f"mmmu/{subject}/validation-00000-of-00001.parquet": [
            _mmmu(f"validation_{subject}_1", "Name <image 1>.", ["x", "y"], "A", "green")
        ]
        for subject in MMMU_SUBJECTS
    },
    "mmmu/Art/validation-00000-of-00001.parquet": [
        _mmmu("validation_Art_1", "Which is in <image 1>?", ["a cat", "<image 2>", "a hen"], "B", "red", "blue"),
    ],
    "mmmu/Math/validation-00000-of-00001.parquet": [
        _mmmu("validation_Math_1", "How many in <image 1>?", [], "['24/7', '3.43']", "red"),
        _mmmu("validation_Math_2", "Name <image 1>.", ["x", "y"], "A", "green"),
    ],
    **{
        f"{data_set}/data/{split}-00000-of-00001-0123456789abcdef.parquet": region_rows()
        for data_set, splits in {
            "RefCOCO": ("val", "testA", "testB"),
            "RefCOCOplus": ("val", "testA", "testB"),
            "RefCOCOg": ("val", "test"),
        }.items()
        for split in splits
    },
}

WRITERS: dict[str, Callable[[Path], None]] = {
    "mmbench": write_mmbench,
    "mmbench_cn": write_mmbench_cn,
    "seedbench": write_seed_bench,
    "llava_bench": write_llava_bench,
    "mm_vet": write_mm_vet,
}


def write_parquet(folder: Path) -> None:
    """Write all of `PARQUET`; needs pyarrow."""
    import pyarrow
    from pyarrow import parquet

    for name, rows in PARQUET.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)


def write_all(folder: Path) -> None:
    """Write all benchmarks of this module; those that are parquet where pyarrow is installed.

    RefCOCO's files are those of `paper_fixtures`, which they replace.
    """
    for write in WRITERS.values():
        write(folder)
    try:
        write_parquet(folder)
    except ModuleNotFoundError:
        return
