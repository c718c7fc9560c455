"""RefCOCO, RefCOCO+ and RefCOCOg and their splits: a task for each, of boxes and of captions alike.

Words of place are not in RefCOCO+, and RefCOCOg has whole sentences; testA is of people, testB of all else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ...task import TASKS, NeededFile
from .benchmark import BenchmarkTask

__all__ = ["REGION_SPLITS", "RegionSplit", "RegionTask", "register_splits"]


@dataclass(frozen=True)
class RegionSplit:
    """A split of a data set, as the Hugging Face hub's ``lmms-lab`` names both."""

    data_set: str
    split: str

    @property
    def task(self) -> str:
        """Name of its task, such as ``refcoco+_testA``."""
        return f"{self.data_set.lower().replace('plus', '+')}_{self.split}"

    @property
    def title(self) -> str:
        """Name for tables, such as ``RefCOCO+ testA``."""
        return f"{self.data_set.replace('plus', '+')} {self.split}"

    @property
    def files(self) -> str:
        """Pattern of its parquet files, in the folder of all data."""
        return f"{self.data_set}/data/{self.split}-*.parquet"


REGION_SPLITS = (
    *(RegionSplit("RefCOCO", split) for split in ("val", "testA", "testB")),
    *(RegionSplit("RefCOCOplus", split) for split in ("val", "testA", "testB")),
    *(RegionSplit("RefCOCOg", split) for split in ("val", "test")),
)


class RegionTask(BenchmarkTask):
    """A task about regions of the images of one split.

    Attributes:
        region_split: which one.
        name: of the task.
    """

    answer_lengths: ClassVar[Mapping[str, int]] = {"llava": 1024, "lmms": 1024}
    region_split: ClassVar[RegionSplit]
    name: ClassVar[str]

    def needs(self) -> tuple[NeededFile, ...]:
        """Return the parquet files of the split, which hold the images, too."""
        source = f"Hugging Face, lmms-lab/{self.region_split.data_set}"
        return (NeededFile(self.region_split.files, "regions, what people call them, and images", source),)


def register_splits(base: type[RegionTask], *, name: str = "", title: str = "", **facts: Any) -> None:
    """Register a task per split, a class each, since a task is known by its class.

    Args:
        base: what the classes are of.
        name: what stands behind the split's in the task's.
        title: likewise in its title.
        **facts: further class attributes.
    """
    for own in REGION_SPLITS:
        own_title, own_name = own.title + title, own.task + name
        told = {"__module__": base.__module__, "__doc__": f"{own_title}; see `{base.__name__}`."}
        about = {**told, "region_split": own, "name": own_name, "title": own_title, **facts}
        words = f"{own.data_set}_{own.split}{name}".split("_")
        TASKS.register(own_name)(type("".join(word[0].upper() + word[1:] for word in words), (base,), about))
