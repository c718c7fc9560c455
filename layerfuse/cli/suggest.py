"""The command that suggests layers to tap, for the pictures of a folder."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from layerfuse.analysis import score_plot, suggest_layers

from ._labelling import add_label_arguments, labelling
from ._looking import add_looking_arguments, backbone_with_layers, prepare_output, write_results

__all__ = ["main"]


def main(argv: Sequence[str]) -> None:
    """Print layers with reasons, or "cannot tell", and write plot, numbers and page."""
    parser = argparse.ArgumentParser(
        prog="layerfuse suggest",
        description="Suggest a few layers that together tell most about the pictures of a folder, and say how sure "
        "that is: probes learn from some pictures and are tested on others. Where layers differ no more than chance "
        "makes them, the answer is: cannot tell.",
        epilog="example: layerfuse suggest timm:vit_base_patch14_dinov2.lvd142m flowers --labels",
    )
    add_label_arguments(parser)
    parser.add_argument("--max-layers", type=int, default=5, help="as many layers at most (default: 5)")
    add_looking_arguments(parser, "suggestion")
    arguments = parser.parse_args(argv)
    prepare_output(arguments)
    source = labelling(arguments)
    labelled = source.read(backbone_with_layers(arguments.model, arguments))
    found = suggest_layers(labelled.features, labelled.labels, max_layers=arguments.max_layers)
    together = "" if found.together is None else f"Together: {found.together:.1%} right."
    drawn = score_plot(found.scores, chosen=found.layers)
    about = (
        f"{labelled.about} {len(source.pictures)} pictures, {found.scores.num_labels:,} labels, "
        f"{len(labelled.classes)} classes."
    )
    print(found.verdict, *found.reasons, *([together] if together else []), sep="\n")
    write_results(
        arguments,
        f"Layers of {arguments.model} to tap: {found.verdict}",
        [about, "\n".join([*found.reasons, together]), ("Right labels by layer, with 95% intervals.", drawn)],
        {
            "layers": list(found.layers),
            "sure": list(found.sure),
            "reasons": list(found.reasons),
            "together": found.together,
            "accuracy": dict(zip(found.scores.layers, found.scores.accuracy, strict=True)),
            "chance": found.scores.chance,
            "p_value": found.scores.p_value,
        },
        {"suggestion.png": drawn},
        left_out=source.pictures.left_out,
    )
