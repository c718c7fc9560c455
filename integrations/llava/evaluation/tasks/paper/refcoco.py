"""RefCOCO, RefCOCO+ and RefCOCOg: the box of what an expression refers to.

The paper's numbers came from lmms-eval's ``refcoco_bbox_rec``, so its prompt and scorer are the ``llava`` protocol as
well as the ``lmms`` one. It divides the right box by the image's sides (``frame="original"``), though LLaVA-1.5 learnt
to say boxes in the square that images are padded to (``frame="padded"``): the same answers are scored both ways.

Layout: ``hf download --repo-type dataset lmms-lab/RefCOCO --local-dir DATA/RefCOCO``, likewise RefCOCOplus and
RefCOCOg: parquet files ``data/SPLIT-*.parquet`` of ``image`` (bytes), ``answer`` (expressions) and ``bbox`` (left, top,
width, height in pixels).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from integrations.llava.data import read_image_size
from layerfuse.errors import InputError

from ...made_images import image_digest, store_image
from ...metrics.boxes import intersection_over_union
from ...metrics.grounding import Box, pad_box, parse_float_box
from ...published_files import parquet_rows
from ...task import Question
from .region_splits import RegionTask, register_splits

__all__ = ["ReferringTask"]

_PROMPT = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of the "
    "region this sentence describes: "
)
_THRESHOLD = 0.5


class ReferringTask(RegionTask):
    """A box that overlaps the right one by half of their union, or more; one question per expression.

    Args:
        protocol: as for every task.
        frame: what fractions in answers are taken to refer to: the image's own sides (the paper's table) or the square
            that it is padded to. ``accuracy`` is that of the frame; both stand beside it under their names.

    Example:
        Lmms-eval's sentences about boxes and ``the man in red`` are answered ``[0.25, 0.31, 0.48, 0.9]``.
    """

    source = "lmms-eval's refcoco_bbox_rec: accuracy at IoU >= 0.5"
    group = "comprehension"
    parts: ClassVar[Mapping[str, str]] = {"padded": "in the padded frame"}

    def __init__(self, protocol: str | None = None, *, frame: Literal["original", "padded"] = "original") -> None:
        super().__init__(protocol)
        if frame not in ("original", "padded"):
            raise InputError(f"frame {frame!r} is unknown; give original or padded.")
        self.frame = frame

    def load(self, folder: str | Path) -> list[Question]:
        """Read the split; images are stored as files, and questions numbered by row and expression."""
        questions = []
        columns = ["image", "answer", "bbox"]
        sizes: dict[str, tuple[int, int] | None] = {}  # many rows are about one image
        for number, row in enumerate(parquet_rows(self, folder, self.region_split.files, columns)):
            content = row["image"]["bytes"]
            name = store_image(folder, f"refcoco/{image_digest(content)}.jpg", partial(bytes, content))
            if name not in sizes:
                sizes[name] = read_image_size(Path(folder) / name, upright=False)
            size, box = sizes[name], row["bbox"]
            if size is None or len(box) != 4:
                raise InputError(
                    f"{Path(folder) / self.region_split.files}, row {number}: the image cannot be read, or its box is "
                    f"no box ({box!r:.80}); get the file anew."
                )
            height, width = size
            right = _fractions(box, width, height)
            questions += [
                Question(f"{number}.{index}", name, text, self.name, right, {"size": (width, height)})
                for index, text in enumerate(row["answer"])
            ]
        return questions

    def prompt(self, question: Question) -> str:
        """Return lmms-eval's sentences, and the expression."""
        return _PROMPT + question.text

    def score(self, answer: str, question: Question) -> Mapping[str, float]:
        """Score the first box in the answer in both frames; one that cannot be read overlaps nothing."""
        width, height = question.fields["size"]
        said = parse_float_box(answer)
        right = {"original": question.answer, "padded": pad_box(question.answer, width, height)}
        overlap = {frame: 0.0 if said is None else intersection_over_union(said, box) for frame, box in right.items()}
        hits = {frame: float(value >= _THRESHOLD) for frame, value in overlap.items()}
        return {"accuracy": hits[self.frame], "iou": overlap[self.frame], **hits}


def _fractions(box: Sequence[float], width: int, height: int) -> Box:
    """Convert a box of left, top, width and height in pixels to edges in fractions of the image's sides."""
    x, y, across, down = map(float, box)
    return x / width, y / height, (x + across) / width, (y + down) / height


register_splits(ReferringTask)
