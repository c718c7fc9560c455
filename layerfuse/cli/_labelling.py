"""Pictures with labels, for the commands that probe layers: folders as classes, label images, letters, or edges."""

from __future__ import annotations

import abc
import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from layerfuse.analysis import LETTERS, Lettering, edge_labels, edge_strength, patch_labels, write_letters
from layerfuse.analysis.cross_validation import NUM_FOLDS
from layerfuse.backbones import Backbone
from layerfuse.errors import InputError, MissingFileError
from layerfuse.features import FeatureMaps, Grid
from layerfuse.pictures import PICTURE_ERRORS

from ._looking import finest, on_finest_grid, some_tokens, take_cells
from ._reading import Pictures, Progress, picture_files, say, some_names

__all__: list[str] = []

# Patch tokens that are probed, of all pictures together.
_TOKENS = 1024
_EDGES = ("flat", "edge")
# Letters of each height, of all pictures together.
_LETTERS = 1024
_HEIGHTS = (6, 8, 11, 16, 22)
_SHOWN = 5


@dataclass(frozen=True)
class Labelled:
    """Feature maps of pictures with their labels.

    Attributes:
        features: L maps of all layers: means of the tokens, or some tokens of each picture.
        labels: (B,) of pictures, or (B, N) of tokens.
        classes: names of the classes.
        about: what is read off what, in a sentence.
        heights: of the letters at the N tokens, in pixels; empty if none were written.
    """

    features: FeatureMaps
    labels: torch.Tensor
    classes: tuple[str, ...]
    about: str
    heights: tuple[int, ...] = field(default=())


class Labelling(abc.ABC):
    """Where labels come from; what is wrong with files is told before a model is built.

    Attributes:
        pictures: that are probed.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder = Path(arguments.folder)
        self.pictures = Pictures(picture_files([arguments.folder]), arguments)

    @abc.abstractmethod
    def read(self, backbone: Backbone) -> Labelled:
        """Run all pictures through the backbone and return what is probed."""

    def _share(self) -> int:
        """Return how many tokens of each picture are probed; asked once, since pictures that are bad go on the way."""
        return max(1, _TOKENS // len(self.pictures))

    def _place(self, name: str) -> Path:
        return self.pictures.files[name].relative_to(self.folder)


def add_label_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the folder, and where labels come from."""
    add = parser.add_argument
    add("model", help="family:name, as in `layerfuse models`; or transformers:FOLDER")
    add("folder", help="of pictures; with --labels, of one folder for each class")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--labels", action="store_true", help="the folders are classes")
    kinds.add_argument(
        "--patch-labels",
        metavar="MASKS",
        help="folder of label images of the pictures' names (PNG, grey or palette: a class number a pixel, 255 for "
        "none); the commonest class in a patch is its label",
    )
    kinds.add_argument("--text", action="store_true", help="write letters into the pictures: which one is in a patch?")
    add(
        "--letter-heights",
        nargs="+",
        type=int,
        metavar="PIXELS",
        help=f"of --text, as the model sees them (default: {' '.join(map(str, _HEIGHTS))}, as far as there is room). "
        "Without all of these: whether a patch shows an edge",
    )


def labelling(arguments: argparse.Namespace) -> Labelling:
    """Return where labels come from, as the arguments say; before the model is built.

    Raises:
        ValueError: if pictures, folders or label images cannot be used.
        FileNotFoundError: if a picture has no label image.
    """
    if arguments.letter_heights and not arguments.text:
        raise InputError("--letter-heights are those of letters that are written with --text; give that, too.")
    kind: type[Labelling] = _Letters if arguments.text else _Edges
    if arguments.labels:
        kind = _Folders
    elif arguments.patch_labels is not None:
        kind = _LabelImages
    found = kind(arguments)
    if len(found.pictures) < NUM_FOLDS:
        raise InputError(
            f"{arguments.folder} holds {len(found.pictures)} pictures; probes learn from some and are tested on "
            f"others, so give at least {NUM_FOLDS}."
        )
    return found


class _Folders(Labelling):
    """The folder of a picture, read off the mean of its tokens."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        places = {name: self._place(name).parts for name in self.pictures.files}
        self._folders = sorted({parts[0] for parts in places.values() if len(parts) > 1})
        loose = [name for name, parts in places.items() if len(parts) == 1]
        if loose or len(self._folders) < 2:
            found = (
                f"{loose[0]} stands beside them" if loose else f"{len(self._folders)} folder with pictures was found"
            )
            raise InputError(
                f"--labels takes the folders in {arguments.folder} for classes, and {found}; give two or more folders "
                "of pictures, or leave --labels out."
            )

    def read(self, backbone: Backbone) -> Labelled:
        parts, labels = [], []
        for batch in self.pictures.batches(backbone):
            means = tuple(tokens.mean(1, keepdim=True) for tokens in batch.features)
            parts.append(replace(batch.features, maps=means, prefix=(), grids=((1, 1),) * len(means)))
            labels += [self._folders.index(self._place(name).parts[0]) for name in batch.names]
        about = "The folder of a picture, read off the mean of its patch tokens."
        return Labelled(FeatureMaps.cat(parts), torch.tensor(labels), tuple(self._folders), about)


class _Edges(Labelling):
    """Whether a patch shows more edge than half of all patches."""

    def read(self, backbone: Backbone) -> Labelled:
        parts, strengths, inside = [], [], list[torch.Tensor]()
        share, grid = self._share(), finest(backbone.grids())

        def prepare(pictures: Mapping[str, Image.Image]) -> torch.Tensor:
            inside[:] = [_inside(picture, backbone, grid) for picture in pictures.values()]
            return backbone.prepare(pictures.values())

        for batch in self.pictures.batches(backbone, prepare):
            some, cells = some_tokens(on_finest_grid(batch.features), share)
            parts.append(some)
            strength = edge_strength(batch.images, grid).where(torch.stack(inside), torch.nan)
            strengths.append(strength[:, cells])
        about = "Whether a patch shows more edge than half of all patches, read off its token."
        return Labelled(FeatureMaps.cat(parts), edge_labels(torch.cat(strengths), len(_EDGES)), _EDGES, about)


class _LabelImages(Labelling):
    """The commonest class of a patch's pixels in a label image beside the picture."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        masks = Path(arguments.patch_labels)
        if not masks.is_dir():
            raise MissingFileError(f"--patch-labels {masks} is no folder; give one of label images.")
        self._masks: dict[str, Path] = {}
        for name in self.pictures.files:
            place = masks / self._place(name)
            found = [path for path in (place.with_suffix(".png"), place) if path.is_file()]
            if found:
                self._masks[name] = found[0]
        if missing := [str(self._place(name)) for name in self.pictures.files if name not in self._masks]:
            raise MissingFileError(
                f"{len(missing)} of {len(self.pictures)} pictures have no label image in {masks}: "
                f"{some_names(missing, _SHOWN)}. Give one of "
                f"the same name for each ({masks / Path(missing[0]).with_suffix('.png')}), or take these pictures out."
            )

    def read(self, backbone: Backbone) -> Labelled:
        random, parts, labels = torch.Generator().manual_seed(0), [], []
        grid, numbers = finest(backbone.grids()), list[torch.Tensor]()

        def prepare(pictures: Mapping[str, Image.Image]) -> torch.Tensor:
            numbers[:] = [self._numbers(name, picture, backbone, grid) for name, picture in pictures.items()]
            return backbone.prepare(pictures.values())

        share = self._share()
        for batch in self.pictures.batches(backbone, prepare):
            cells = torch.stack([_labelled_first(each, random)[:share] for each in numbers])
            parts.append(take_cells(on_finest_grid(batch.features), cells))
            labels.append(torch.stack(numbers).gather(1, cells))
        found, classes = self._shared(torch.cat(labels))
        about = "The commonest class of a patch's pixels, read off its token."
        return Labelled(FeatureMaps.cat(parts), found, tuple(map(str, classes)), about)

    def _numbers(self, name: str, picture: Image.Image, backbone: Backbone, grid: Grid) -> torch.Tensor:
        path = self._masks[name]
        try:
            with Image.open(path) as mask:
                mask.load()
        except PICTURE_ERRORS as error:
            raise InputError(f"the label image {path} cannot be read ({error}); write it anew.") from error
        if mask.size != picture.size:
            held, wanted = (f"{each.height}×{each.width}" for each in (mask, picture))
            raise InputError(
                f"the label image {path} has {held} pixels, and its picture {name} has {wanted}; give one with a class "
                "for each pixel of the picture."
            )
        try:
            return _cells(mask, picture, backbone, grid)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def _shared(self, labels: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
        """Return labels counted from 0, without classes that only one picture shows, and the classes' own numbers."""
        present = sorted(set(labels.flatten().tolist()) - {-1})
        shared = [number for number in present if int((labels == number).any(1).sum()) > 1]
        if len(shared) < 2:
            raise InputError(
                f"label images have {len(shared)} classes that more than one picture shows ({len(present)} in all); "
                "give pictures that share two classes or more. 255 counts as no class."
            )
        if alone := [number for number in present if number not in shared]:
            say(f"classes that only one picture shows are left out: {', '.join(map(str, alone))}")
        counted = torch.full_like(labels, -1)
        for position, number in enumerate(shared):
            counted[labels == number] = position
        return counted, shared


class _Letters(Labelling):
    """Which letter stands in a patch, for letters of several heights that are written into the pictures."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__(arguments)
        self._heights = tuple(sorted(set(arguments.letter_heights or _HEIGHTS)))
        self._given = bool(arguments.letter_heights)

    def read(self, backbone: Backbone) -> Labelled:
        heights = self._fitting(backbone)
        share = -(-_LETTERS // len(self.pictures))
        features, labels = zip(*(self._of_height(height, share, backbone) for height in heights), strict=True)
        about = (
            f"Which of the letters {LETTERS} stands in a patch, read off its token: the middle one of three that are "
            f"written into the pictures, {', '.join(map(str, heights))} pixels high."
        )
        tall = tuple(height for height in heights for _ in range(share))
        return Labelled(_in_a_row(features), torch.cat(labels, dim=1), tuple(LETTERS), about, tall)

    def _fitting(self, backbone: Backbone) -> tuple[int, ...]:
        """Return the heights for which pictures have room; those that a user named are all tried."""
        blank = Image.new("RGB", backbone.image_size[::-1])
        fitting = []
        for height in self._heights:
            try:
                _written(blank, height, None, backbone, torch.Generator())
            except InputError:
                if self._given or height == self._heights[0]:
                    raise
                say(f"letters of {height} pixels have no room in pictures of this size and are left out")
            else:
                fitting.append(height)
        return tuple(fitting)

    def _of_height(self, height: int, share: int, backbone: Backbone) -> tuple[FeatureMaps, torch.Tensor]:
        """Return tokens and labels of ``share`` letters of a height for each picture, in as many rounds as it takes."""
        report = Progress(f"letters of {height} pixels")
        random = torch.Generator().manual_seed(height)
        tokens, labels, there = [], [], 0
        while there < share:
            part = self._round(height, share, there, backbone, random, report)
            tokens.append(part[0])
            labels.append(part[1])
            there += part[1].shape[1]
        return _in_a_row(tokens), torch.cat(labels, dim=1)

    def _round(
        self, height: int, share: int, there: int, backbone: Backbone, random: torch.Generator, report: Progress
    ) -> tuple[FeatureMaps, torch.Tensor]:
        """Return what one look at each picture adds to the ``there`` letters that it has, of ``share``."""
        cells, letters = list[torch.Tensor](), list[torch.Tensor]()

        def prepare(pictures: Mapping[str, Image.Image]) -> torch.Tensor:
            fitted = (backbone.preprocessing.fit(picture) for picture in pictures.values())
            written = [_written(picture, height, share - there, backbone, random) for picture in fitted]
            cells[:] = [each.cells for each in written]
            letters.extend(each.letters for each in written)
            pixels = torch.stack([torch.from_numpy(np.array(each.picture)).permute(2, 0, 1) for each in written])
            return backbone.preprocessing.normalize(pixels)

        def tell(done: int, total: int) -> None:
            report(there * len(self.pictures) + sum(map(len, letters)), share * len(self.pictures))

        parts = [
            take_cells(on_finest_grid(batch.features), torch.stack(cells))
            for batch in self.pictures.batches(backbone, prepare, tell)
        ]
        return FeatureMaps.cat(parts), torch.stack(letters)


def _in_a_row(parts: Sequence[FeatureMaps]) -> FeatureMaps:
    """Return the tokens of several maps of the same B pictures side by side, as maps of one row."""
    joined = tuple(torch.cat(maps, dim=1) for maps in zip(*(part.maps for part in parts), strict=True))
    return replace(parts[0], maps=joined, grids=((1, joined[0].shape[1]),) * len(joined))


def _cells(mask: Image.Image, picture: Image.Image, backbone: Backbone, grid: Grid) -> torch.Tensor:
    """Return `patch_labels` of a label image, which is turned as its picture is."""
    mask.info = dict(picture.info)
    return patch_labels(mask, backbone.preprocessing, grid)


def _inside(picture: Image.Image, backbone: Backbone, grid: Grid) -> torch.Tensor:
    """Tell of each cell whether it shows the picture, and not what was padded."""
    return _cells(Image.new("L", picture.size), picture, backbone, grid) >= 0


def _written(
    picture: Image.Image, height: int, count: int | None, backbone: Backbone, random: torch.Generator
) -> Lettering:
    grids = backbone.grids()
    coarsest = min(grids, key=math.prod)
    return write_letters(picture, height, grid=finest(grids), coarsest=coarsest, count=count, random=random)


def _labelled_first(numbers: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Return all cells in a random order, those without a label last."""
    order = torch.randperm(len(numbers), generator=random)
    return torch.cat([order[numbers[order] >= 0], order[numbers[order] < 0]])
