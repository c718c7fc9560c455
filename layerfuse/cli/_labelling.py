"""Pictures with labels, for the commands that probe layers: folders as classes, or edges in the pictures."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from layerfuse.analysis import edge_labels, edge_strength
from layerfuse.backbones import Backbone
from layerfuse.errors import InputError
from layerfuse.features import FeatureMaps

from ._looking import batches_of, picture_files, some_tokens

__all__: list[str] = []

# Patch tokens that edges are read off, of all pictures together.
_TOKENS = 1024
_EDGES = ("flat", "edge")


@dataclass(frozen=True)
class Labelled:
    """Feature maps of pictures with their labels.

    Attributes:
        features: L maps of all layers: means of the tokens, or some tokens of each picture.
        labels: (B,) of pictures, or (B, N) of tokens.
        classes: names of the classes.
        about: what is read off what, in a sentence.
    """

    features: FeatureMaps
    labels: torch.Tensor
    classes: tuple[str, ...]
    about: str


def add_label_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, the folder, and where labels come from."""
    add = parser.add_argument
    add("model", help="family:name, as in `layerfuse models`; or transformers:FOLDER")
    add("folder", help="of pictures; with --labels, of one folder for each class")
    add("--labels", action="store_true", help="the folders are classes; else: whether a patch shows an edge")


def labelled_pictures(arguments: argparse.Namespace) -> tuple[dict[str, Path], dict[str, int]]:
    """Return the pictures of the folder, and with ``--labels`` the class of each; before the model is built.

    Raises:
        ValueError: with ``--labels``, if pictures stand beside the folders, or there is one class only.
    """
    files = picture_files([arguments.folder])
    if not arguments.labels:
        return files, {}
    places = {name: path.relative_to(arguments.folder).parts for name, path in files.items()}
    names = {parts[0] for parts in places.values() if len(parts) > 1}
    loose = [name for name, parts in places.items() if len(parts) == 1]
    if loose or len(names) < 2:
        found = f"{loose[0]} stands beside them" if loose else f"{len(names)} folder with pictures was found"
        raise InputError(
            f"--labels takes the folders in {arguments.folder} for classes, and {found}; give two or more folders of "
            "pictures, or leave --labels out."
        )
    return files, {name: sorted(names).index(parts[0]) for name, parts in places.items()}


def labelled_maps(
    arguments: argparse.Namespace, files: dict[str, Path], classes: dict[str, int], backbone: Backbone
) -> Labelled:
    """Run all pictures through the backbone and keep what is probed."""
    parts: list[FeatureMaps] = []
    strengths: list[torch.Tensor] = []
    for images, features in batches_of(files, backbone, arguments.batch_size):
        if classes:
            means = tuple(tokens.mean(1, keepdim=True) for tokens in features)
            parts.append(replace(features, maps=means, prefix=(), grids=((1, 1),) * len(means)))
            continue
        some, cells = some_tokens(features, max(1, _TOKENS // len(files)))
        parts.append(some)
        strengths.append(edge_strength(images, features.grids[0])[:, cells])
    features = FeatureMaps.cat(parts)
    if classes:
        names = tuple(sorted({Path(name).relative_to(arguments.folder).parts[0] for name in files}))
        labels = torch.tensor([classes[name] for name in files])
        return Labelled(features, labels, names, "The folder of a picture, read off the mean of its patch tokens.")
    about = "Whether a patch shows more edge than half of all patches, read off its token."
    return Labelled(features, edge_labels(torch.cat(strengths), len(_EDGES)), _EDGES, about)
