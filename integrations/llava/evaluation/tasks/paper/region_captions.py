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
from ...task import Question, ScoredAnswer
from .region_splits import RegionTask, register_splits

__all__ = ["RegionCaptionTask"]

_PROMPT = "Provide a short description for this region."


class RegionCaptionTask(RegionTask):
    """CIDEr of descriptions of marked regions; one question per region, what people call it as references.

    Which words are rare is told by the whole split, once it is loaded.

    Example:
        An image with a red box in it and ``Provide a short description for this region.`` is answered
        ``man in a red shirt``.
    """

    source = "lmms-eval's refcoco_bbox and refcoco_seg: CIDEr"
    group = "caption"
    metric = "cider"
    marked: ClassVar[Literal["box", "outline"]]

    def __init__(self, protocol: str | None = None) -> None:
        super().__init__(protocol)
        self._corpus: CiderCorpus | None = None

    def load(self, folder: str | Path) -> list[Question]:
        """Read the split; images with their mark in them are stored as files."""
        column = "bbox" if self.marked == "box" else "segmentation"
        questions = []
        for number, row in enumerate(parquet_rows(self, folder, self.region_split.files, ["image", "answer", column])):
            place = f"{Path(folder) / self.region_split.files}, row {number}"
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


register_splits(RegionCaptionTask, name="_caption", title=" captions", marked="box")
register_splits(RegionCaptionTask, name="_caption_outline", title=" captions (outline)", marked="outline")
