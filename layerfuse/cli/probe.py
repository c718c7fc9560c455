"""The command that says what can be read off each layer, for the pictures of a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from layerfuse.analysis import cross_validate_layers, heat_map, probe_letters, score_plot

from ._labelling import Labelled, add_label_arguments, labelling
from ._looking import add_looking_arguments, backbone_with_layers, prepare_output, write_results

__all__ = ["main"]

# A page's parts, numbers for JSON, and the picture.
_Told = tuple[list[str | tuple[str, bytes]], dict[str, Any], bytes]


def main(argv: Sequence[str]) -> None:
    """Print a table of layers, and write plot, numbers and page."""
    parser = argparse.ArgumentParser(
        prog="layerfuse probe",
        description="Fit a linear probe to each layer and test it on pictures that it has not seen.",
        epilog="example: layerfuse probe timm:vit_base_patch14_dinov2.lvd142m flowers --labels",
    )
    add_label_arguments(parser)
    add_looking_arguments(parser, "probes")
    arguments = parser.parse_args(argv)
    prepare_output(arguments)
    source = labelling(arguments)
    labelled = source.read(backbone_with_layers(arguments.model, arguments))
    parts, numbers, drawn = _letters(labelled) if labelled.heights else _scores(labelled)
    about = f"{labelled.about} {len(source.pictures)} pictures, {len(labelled.classes)} classes."
    write_results(
        arguments,
        f"What the layers of {arguments.model} tell",
        [about, *parts],
        {"classes": list(labelled.classes), **numbers},
        {"probes.png": drawn},
        left_out=source.pictures.left_out,
    )


def _scores(labelled: Labelled) -> _Told:
    """Probe labels of one kind, and print a line for each layer."""
    scores = cross_validate_layers(labelled.features, labelled.labels)
    rows = zip(scores.layers, scores.accuracy, scores.intervals, strict=True)
    table = [f"{layer:>5}  {right:6.1%}  {low:6.1%} to {high:6.1%}" for layer, right, (low, high) in rows]
    print("layer   right  95 of 100 resamples", *table, sep="\n")
    beaten = (
        f"{scores.num_labels:,} labels. Chance is {scores.chance:.1%}; with shuffled labels the best layer does as "
        f"well in {scores.p_value:.1%} of cases."
    )
    print(beaten)
    drawn = score_plot(scores)
    numbers = {
        "accuracy": dict(zip(scores.layers, scores.accuracy, strict=True)),
        "intervals": dict(zip(scores.layers, scores.intervals, strict=True)),
        "chance": scores.chance,
        "p_value": scores.p_value,
    }
    return [beaten, ("Right labels by layer, with 95% intervals.", drawn)], numbers, drawn


def _letters(labelled: Labelled) -> _Told:
    """Probe letters of each height, and print a line for each layer."""
    found = probe_letters(labelled.features, labelled.labels, labelled.heights)
    print("layer  legible from  " + "  ".join(f"{height:>3} px" for height in found.scores))
    for layer, height, rights in zip(found.layers, found.legible_from, found.accuracy.T.tolist(), strict=True):
        start = "never" if height is None else f"{height} pixels"
        print(f"{layer:>5}  {start:>12}  " + "  ".join(f"{right:6.1%}" for right in rights))
    chance = max(scores.chance for scores in found.scores.values())
    sizes = {scores.num_labels for scores in found.scores.values()}
    beaten = f"{min(sizes):,} letters of each height. Chance is {chance:.1%}."
    print(beaten, found.verdict, sep="\n")
    drawn = heat_map(
        {"right letters": found.accuracy},
        rows=list(found.scores),
        columns=found.layers,
        labels=("height of letters in pixels", "layer"),
    )
    numbers = {
        "heights": list(found.scores),
        "accuracy": dict(zip(found.layers, found.accuracy.T.tolist(), strict=True)),
        "legible_from": dict(zip(found.layers, found.legible_from, strict=True)),
        "chance": {height: scores.chance for height, scores in found.scores.items()},
        "p_value": {height: scores.p_value for height, scores in found.scores.items()},
    }
    meaning = "Legible: more than half of what chance does not give, at this height and all larger ones."
    return [f"{beaten} {found.verdict} {meaning}", ("Right letters by height and layer.", drawn)], numbers, drawn
