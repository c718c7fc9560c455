"""The command that draws how alike the layers of a backbone are, or those of two."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from layerfuse.analysis import heat_map, layer_similarity
from layerfuse.backbones import AnyBackbone
from layerfuse.features import FeatureMaps

from ._encoders import tapped_backbone
from ._looking import (
    add_looking_arguments,
    finest,
    on_finest_grid,
    prepare_output,
    some_tokens,
    write_results,
)
from ._reading import Pictures, picture_files, say

__all__ = ["main"]

# Patch tokens that are compared, of all pictures together: many more than channels, and they fit into memory.
_TOKENS = 8192


def main(argv: Sequence[str]) -> None:
    """Write heat maps of cosine and CKA between layers."""
    parser = argparse.ArgumentParser(
        prog="layerfuse similarity",
        description="Draw how alike the layers of a backbone are: the mean cosine of their patch tokens, and linear "
        "CKA (arXiv:1905.00414). With a second backbone, CKA between the layers of the two.",
        epilog="example: layerfuse similarity timm:vit_base_patch14_dinov2.lvd142m photos --output similarity",
    )
    add = parser.add_argument
    add(
        "model",
        help="family:name, as in `layerfuse models`, or transformers:FOLDER; or the folder of a trained encoder",
    )
    add("images", nargs="+", help="pictures, and folders of them")
    add("--with", dest="second", metavar="MODEL2", help="compare with the layers of this backbone")
    add_looking_arguments(parser, "similarity")
    arguments = parser.parse_args(argv)
    pictures = Pictures(picture_files(arguments.images), arguments)
    prepare_output(arguments)
    first = tapped_backbone(arguments.model, arguments)
    grid = finest(first.grids())
    share = max(1, _TOKENS // len(pictures))  # for both backbones: the second no longer sees pictures that are bad
    features = _tokens(pictures, first, on_finest_grid, share)
    others, names = None, _numbered(first)
    notes = []
    if arguments.second:
        second = tapped_backbone(arguments.second, arguments)
        if len({*_cuts(first), *_cuts(second)}) > 1:
            notes.append(
                "The two see pictures of other sizes or cuts, so that cells lie over one another only roughly: "
                "--image-size brings both to one size."
            )
            say(notes[-1])
        others = _tokens(pictures, second, lambda maps: maps.resample(grid), share)
        names = _numbered(second)
    titles = {"cosine": "cosine of tokens", "cka": "linear CKA"}
    measures = ("cosine", "cka") if others is None and len(set(features.channels)) == 1 else ("cka",)
    matrices = {measure: layer_similarity(features, others, measure=measure) for measure in measures}
    labels = (_axis(arguments.model), _axis(arguments.second or arguments.model))
    drawn = heat_map(
        {titles[measure]: matrix for measure, matrix in matrices.items()},
        rows=_numbered(first),
        columns=names,
        labels=labels,
    )
    num_tokens = features.batch_size * features.maps[0].shape[1]
    about = (
        f"{len(pictures)} pictures, grid {grid[0]}×{grid[1]}, {num_tokens:,} patch tokens; layer 0 is the embeddings."
    )
    if num_tokens < 2 * max(*features.channels, *(others.channels if others else ())):
        notes.append("CKA is biased upwards: there are fewer than two tokens for each channel. Take more pictures.")
    title = f"Layers of {arguments.model}" + (f" and of {arguments.second}" if arguments.second else "")
    numbers = {measure: matrix.tolist() for measure, matrix in matrices.items()}
    write_results(
        arguments,
        title,
        [about, *notes, ("How alike every two layers are: 1 is the same.", drawn)],
        {"rows": _numbered(first), "columns": names, "tokens": num_tokens, "notes": notes, **numbers},
        {"similarity.png": drawn},
        left_out=pictures.left_out,
    )


def _tokens(
    pictures: Pictures, backbone: AnyBackbone, on_one_grid: Callable[[FeatureMaps], FeatureMaps], share: int
) -> FeatureMaps:
    """Return so many tokens of each picture; of two backbones on one grid those of the same cells."""
    return FeatureMaps.cat([some_tokens(on_one_grid(batch.features), share)[0] for batch in pictures.batches(backbone)])


def _numbered(backbone: AnyBackbone) -> list[int] | list[str]:
    """Return the layers' numbers; of several backbones with the number of the backbone, from 1, before them."""
    if len(backbone.members) == 1:
        return list(backbone.layers)
    return [f"{source + 1}: {layer}" for source, layer in backbone.taps]


def _cuts(backbone: AnyBackbone) -> set[tuple[str, tuple[int, int]]]:
    """Return what says which part of a picture the backbones see."""
    return {(member.preprocessing.mode, member.image_size) for member in backbone.members}


def _axis(model: str) -> str:
    """Return a model's name without its family, of a folder the last part, for an axis."""
    name = model.partition(":")[2] or model
    return f"layer of {Path(name).name if Path(name).is_dir() else name}"
