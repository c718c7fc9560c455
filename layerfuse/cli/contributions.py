"""The command that measures what each layer contributes to the tokens of a fuser, and draws where."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from layerfuse.analysis import (
    LayerContributions,
    contribution_plot,
    layer_contributions,
    map_sheet,
    mean_features,
)
from layerfuse.backbones import AnyBackbone
from layerfuse.errors import InputError

from ._encoders import about_model, add_encoder_arguments, layer_titles, pictures_as_seen, tapped_model
from ._looking import add_looking_arguments, prepare_output, write_results
from ._reading import Batch, Pictures, picture_files

__all__ = ["main"]

_MEANING = (
    "Moved: how far the fused tokens move when this layer alone is replaced by {}, as a share of how far they move "
    "when all are. Shares need not sum to 100%: below, layers stand in for one another."
)
_STANDS_FOR_IT = {"mean": "its mean", "zeros": "zeros"}
_KINDS = {
    "moved": "where the fused tokens move without each layer",
    "own": "how much the fuser's own weights give each layer",
}
_OWN = "Own weights: what the fuser says of itself, whatever its maps hold."


def main(argv: Sequence[str]) -> None:
    """Print a table of layers, and write bars, maps, numbers and page."""
    parser = argparse.ArgumentParser(
        prog="layerfuse contributions",
        description="Measure what each layer contributes to the tokens of a trained encoder: how far they move without "
        "it, where in the picture, and how much its fuser's own weights give it.",
        epilog="example: layerfuse contributions folder-of-a-trained-encoder photos",
    )
    add_encoder_arguments(parser)
    parser.add_argument(
        "--replace-with",
        choices=tuple(_STANDS_FOR_IT),
        default="mean",
        help="what stands for a layer that is taken away (default: its mean token)",
    )
    add_looking_arguments(parser, "contributions")
    arguments = parser.parse_args(argv)
    prepare_output(arguments)
    pictures = Pictures(picture_files(arguments.images), arguments)
    backbone, fuser = tapped_model(arguments)
    if fuser is None:
        raise InputError(f"{arguments.model} is a backbone alone; give the folder of a trained encoder, or a --fuser.")
    if fuser.condition_channels is not None:
        raise InputError(
            f"the fuser {fuser.name!r} reads a condition beside the pictures, which this command does not have; call "
            "layerfuse.analysis.layer_contributions with one."
        )
    batches = list(pictures.batches(backbone))
    away = mean_features([batch.features for batch in batches])
    if arguments.replace_with == "zeros":
        away = away.map(torch.zeros_like)
    found = LayerContributions.cat([layer_contributions(fuser, batch.features, reference=away) for batch in batches])
    titles = layer_titles(backbone)
    _print(found, titles)
    bars = contribution_plot(found, titles)
    about = [*about_model(arguments, backbone, fuser), _MEANING.format(_STANDS_FOR_IT[arguments.replace_with])]
    parts: list[str | tuple[str, bytes]] = [
        "\n".join([*about, *([] if found.own is None else [_OWN])]),
        ("What each layer contributes.", bars),
    ]
    drawn = {"contributions.png": bars}
    for name, kind, sheet in _sheets(found, batches, backbone):
        drawn[f"{name}-{kind}.png"] = sheet
        parts.append((f"{name}: {_KINDS[kind]}, on one scale", sheet))
    shares = found.own_shares
    numbers = {
        "layers": list(backbone.layers),
        "sources": [source for source, _ in backbone.taps],
        "fuser": fuser.name,
        "replaced_with": arguments.replace_with,
        "moved": found.moved.tolist(),
        "own_shares": None if shares is None else shares.tolist(),
    }
    title = f"What each layer contributes in {arguments.model}"
    write_results(arguments, title, parts, numbers, drawn, left_out=pictures.left_out)


def _sheets(
    found: LayerContributions, batches: Sequence[Batch], backbone: AnyBackbone
) -> Iterator[tuple[str, str, bytes]]:
    """Give the sheets of all pictures: name, kind, PNG."""
    titles, sources = layer_titles(backbone), [source for source, _ in backbone.taps]
    kinds = {"moved": found.moved_maps, "own": found.own if found.own is not None and found.own.ndim == 4 else None}
    place = 0
    for batch in batches:
        for name, seen in zip(batch.names, pictures_as_seen(batch.images, backbone), strict=True):
            for kind, maps in kinds.items():
                if maps is not None:
                    own = dict(zip(titles, maps[place].float(), strict=True))
                    sheet = map_sheet([seen[source] for source in sources], own, common_scale=True)
                    yield f"{place:03d}-{Path(name).stem}", kind, sheet
            place += 1


def _print(found: LayerContributions, titles: Sequence[str]) -> None:
    width = max(map(len, titles))
    shares = found.own_shares
    print(f"{'':<{width}}  moved" + ("" if shares is None else "  own weights"))
    for place, title in enumerate(titles):
        own = "" if shares is None else f"  {float(shares[place]):11.1%}"
        print(f"{title:<{width}}  {float(found.moved[place]):5.1%}{own}")
