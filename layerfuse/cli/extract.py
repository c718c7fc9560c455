"""The command that writes the feature maps of a folder of pictures into a store."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from layerfuse.errors import InputError
from layerfuse.pictures import picture_names
from layerfuse.store import FeatureStore, extract_folder

from ._looking import backbone_with_layers, layer_choice
from ._reading import Progress, add_reading_arguments, some_names, tell_left_out

__all__ = ["main"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_RANDOM = "WEIGHTS ARE RANDOM (--pretrained false): these features say nothing about the pictures."


def main(argv: Sequence[str]) -> None:
    """Fill a store with the feature maps of a folder of pictures, or go on where an earlier command was stopped."""
    parser = argparse.ArgumentParser(
        prog="layerfuse extract",
        description="Write the feature maps of a folder of pictures into a store, which layerfuse.store.FeatureStore "
        "reads. The same command goes on where it was stopped or killed.",
        epilog="example: layerfuse extract photos --model timm:vit_base_patch14_dinov2.lvd142m --layers 6 9 -1 "
        "--out features --dtype bf16",
    )
    add = parser.add_argument
    add("folder", help="of pictures, and of folders of them")
    add("--model", required=True, help="family:name, as in `layerfuse models`; or transformers:FOLDER")
    add(
        "--layers",
        nargs="+",
        type=layer_choice,
        required=True,
        help="numbers (-2 = last but one), or shares such as 0.5",
    )
    add("--out", required=True, help="folder of the store")
    add("--dtype", choices=_DTYPES, help="of the numbers in files, if not the model's own")
    add_reading_arguments(parser, batch_size=16)
    add("--shard-size", type=int, default=64, help="pictures in a file (default: 64); what a kill loses")
    add("--workers", type=int, default=4, help="threads that read pictures (default: 4)")
    add("--image-size", nargs="+", type=int, metavar="PIXELS", help="edge, or height and width, if not its own")
    add("--device", help="such as cuda:1; the first GPU if there is one, else the CPU")
    add("--pretrained", choices=("true", "false"), default="true", help="false: random weights, to try things out")
    arguments = parser.parse_args(argv)
    total = len(picture_names(arguments.folder))  # before the model, which may have to be downloaded
    # Random weights have to be the same ones in each call, or nobody could go on with a store.
    backbone = backbone_with_layers(arguments.model, arguments, arguments.layers, random=_RANDOM)
    bad = extract_folder(
        arguments.folder,
        backbone,
        arguments.out,
        dtype=_DTYPES.get(arguments.dtype),
        batch_size=arguments.batch_size,
        shard_size=arguments.shard_size,
        num_workers=arguments.workers,
        notes={"model": arguments.model, "pretrained": arguments.pretrained == "true"},
        report=Progress(),
    )
    print(f"{len(FeatureStore(arguments.out)):,} pictures in {arguments.out}, layers {backbone.layers}")
    if bad and arguments.bad_images == "fail":
        raise InputError(
            f"{len(bad)} of {total} pictures could not be read: {some_names([*bad])}. The others are in the store; "
            "mend or remove these, then start the same command again."
        )
    tell_left_out(bad, total)
