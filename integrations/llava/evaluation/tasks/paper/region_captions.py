"""RefCOCO, RefCOCO+ and RefCOCOg the other way round: a region is marked in the image, and the model describes it.

Layout: that of `refcoco`, parquet files ``data/SPLIT-*.parquet`` of ``image``, ``answer`` (what people call the
region), ``bbox`` (left, top, width, height in pixels) and ``segmentation`` (x, y, x, y, …).

Source: lmms-eval's ``refcoco_bbox`` and ``refcoco_seg``, which the paper's table of captions came from; which of both,
it does not say. The box is red and a pixel wide; the outline is white, which Pillow takes where no colour is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from PIL import ImageDraw

from integrations.llava.data import read_image
from layerfuse.errors import InputError

from ...made_images import image_digest, png_bytes, store_image
from ...metrics.cider import CiderCorpus
from ...published_files import parquet_rows
from ...table_pictures import stored_picture, table_picture
from ...task import TASKS, NeededFile, Question, ScoredAnswer
from .benchmark import BenchmarkTask

__all__ = ["RegionCaptionTask"]

_PROMPT = "Provide a short description for this region."
_SPLITS = {
    "RefCOCO": ("val", "testA", "testB"),
    "RefCOCOplus": ("val", "testA", "testB"),
    "RefCOCOg": ("val", "test"),
}


class RegionCaptionTask(BenchmarkTask):
    """CIDEr of descriptions of marked regions; one question per region, what people call it as references.

    Which words are rare is told by the whole split, once it is loaded.

    Example:
        An image with a red box in it and ``Provide a short description for this region.`` is answered
        ``man in a red shirt``.
    """

    source = "lmms-eval's refcoco_bbox and refcoco_seg: CIDEr"
    group = "caption"
    metric = "cider"
    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 1024, "lmms": 1024}
    data_set: ClassVar[str]
    split: ClassVar[str]
    marked: ClassVar[Literal["box", "outline"]]

    def __init__(self, protocol: str | None = None) -> None:
        super().__init__(protocol)
        self._corpus: CiderCorpus | None = None

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the parquet files of the split, which hold the images, too."""
        return (NeededFile(self._files, "regions, captions and images", f"Hugging Face, lmms-lab/{self.data_set}"),)

    def load(self, folder: str | Path) -> list[Question]:
        """Read the split; images with their mark in them are stored as files."""
        column = "bbox" if self.marked == "box" else "segmentation"
        questions = []
        for number, row in enumerate(parquet_rows(self, folder, self._files, ["image", "answer", column])):
            place = f"{Path(folder) / self._files}, row {number}"
            captions = [str(one) for one in row["answer"] or ()]
            points = _points(row[column], self.marked)
            if not captions or points is None:
                raise InputError(f"{place} has no caption, or no {column} ({row[column]!r:.80}); get the file anew.")
            content = table_picture(row["image"], place)
            original = Path(folder) / stored_picture(folder, "refcoco", content)
            name = f"refcoco_marked/{image_digest(content, f'{self.marked}{points}')}.png"
            shown = store_image(folder, name, partial(_marked, original, self.marked, points))
            questions.append(Question(number, shown, _PROMPT, self.name, tuple(captions)))
        self._corpus = CiderCorpus(own.answer for own in questions)
        return questions

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score a description, if the split was loaded; `aggregate` scores all together if not."""
        return {} if self._corpus is None else {"cider": self._corpus.score(answer, question.answer)}

    def aggregate(self, scores: Sequence[ScoredAnswer]) -> dict[str, float]:
        """Average CIDEr; without a loaded split the answered regions tell which words are rare."""
        if all("cider" in own.scores for own in scores):
            each = [own.scores["cider"] for own in scores]
        else:
            corpus = CiderCorpus(own.question.answer for own in scores)
            each = [corpus.score(own.prediction, own.question.answer) for own in scores]
        return {"cider": sum(each) / len(each)}

    @property
    def name(self) -> str:
        """Its name among the tasks."""
        return _task_name(self.data_set, self.split, self.marked)

    @property
    def _files(self) -> str:
        return f"{self.data_set}/data/{self.split}-*.parquet"


def _task_name(data_set: str, split: str, marked: str) -> str:
    return f"{data_set.lower().replace('plus', '+')}_{split}_caption" + ("" if marked == "box" else "_outline")


def _points(value: Any, marked: str) -> tuple[float, ...] | None:
    """Corners of a box, or of a polygon, as Pillow draws them; None if they are none."""
    try:
        numbers = tuple(float(one) for one in value)
    except (TypeError, ValueError):
        return None
    if marked == "box":
        x, y, width, height = numbers if len(numbers) == 4 else (0.0, 0.0, -1.0, -1.0)
        return (x, y, x + width, y + height) if width >= 0 and height >= 0 else None
    return numbers if len(numbers) >= 4 and len(numbers) % 2 == 0 else None


def _marked(original: Path, marked: str, points: tuple[float, ...]) -> bytes:
    image = read_image(original)
    draw = ImageDraw.Draw(image)
    if marked == "box":
        draw.rectangle(points, outline="red")
    else:
        draw.polygon(points)
    return png_bytes(image)


def _register() -> None:
    """One task per split and mark; a class each, since a task is named by its class."""
    for data_set, splits in _SPLITS.items():
        for split in splits:
            for marked in ("box", "outline"):
                title = f"{data_set.replace('plus', '+')} {split} captions" + (" (outline)" if marked != "box" else "")
                name = f"{data_set}{split.title()}{marked.title()}Captions"
                facts = {"title": title, "data_set": data_set, "split": split, "marked": marked, "__module__": __name__}
                own = type(name, (RegionCaptionTask,), {**facts, "__doc__": f"{title}; see `RegionCaptionTask`."})
                TASKS.register(_task_name(data_set, split, marked))(own)


_register()
