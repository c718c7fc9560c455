"""The command that says what can be read off each layer, for the pictures of a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from layerfuse.analysis import cross_validate_layers, score_plot

from ._labelling import add_label_arguments, labelled_maps, labelled_pictures
from ._looking import add_looking_arguments, backbone_with_layers, prepare_output, write_results

__all__ = ["main"]


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
    files, classes = labelled_pictures(arguments)
    labelled = labelled_maps(arguments, files, classes, backbone_with_layers(arguments.model, arguments))
    scores = cross_validate_layers(labelled.features, labelled.labels)
    rows = zip(scores.layers, scores.accuracy, scores.intervals, strict=True)
    table = [f"{layer:>5}  {right:6.1%}  {low:6.1%} to {high:6.1%}" for layer, right, (low, high) in rows]
    print("layer   right  95 of 100 resamples", *table, sep="\n")
    beaten = (
        f"Chance is {scores.chance:.1%}; with shuffled labels the best layer does as well in {scores.p_value:.1%} of "
        "cases."
    )
    print(beaten)
    drawn = score_plot(scores)
    about = f"{labelled.about} {len(files)} pictures, {scores.num_labels:,} labels, {len(labelled.classes)} classes."
    write_results(
        arguments,
        f"What the layers of {arguments.model} tell",
        [about, beaten, ("Right labels by layer, with 95% intervals.", drawn)],
        {
            "classes": list(labelled.classes),
            "accuracy": dict(zip(scores.layers, scores.accuracy, strict=True)),
            "intervals": dict(zip(scores.layers, scores.intervals, strict=True)),
            "chance": scores.chance,
            "p_value": scores.p_value,
        },
        {"probes.png": drawn},
    )
