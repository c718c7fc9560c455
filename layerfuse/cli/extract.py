"""The command that writes the feature maps of a folder of pictures into a store."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from layerfuse.backbones import create_backbone
from layerfuse.errors import InputError
from layerfuse.pictures import picture_names
from layerfuse.store import FeatureStore, extract_folder

__all__ = ["main"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Seconds between two lines of progress where nobody watches.
_PATIENCE = 10.0


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
    add("--layers", nargs="+", type=_layer, required=True, help="numbers (-2 = last but one), or shares such as 0.5")
    add("--out", required=True, help="folder of the store")
    add("--dtype", choices=_DTYPES, help="of the numbers in files, if not the model's own")
    add("--batch-size", type=int, default=16, help="pictures that the model sees at a time (default: 16)")
    add("--shard-size", type=int, default=64, help="pictures in a file (default: 64); what a kill loses")
    add("--workers", type=int, default=4, help="threads that read pictures (default: 4)")
    add("--image-size", nargs="+", type=int, metavar="PIXELS", help="edge, or height and width, if not its own")
    add("--device", help="such as cuda:1; the first GPU if there is one, else the CPU")
    add("--pretrained", choices=("true", "false"), default="true", help="false: random weights, to try things out")
    arguments = parser.parse_args(argv)
    size = arguments.image_size
    if size is not None and len(size) > 2:
        raise InputError(f"--image-size names {len(size)} numbers; give one edge, or height and width.")
    total = len(picture_names(arguments.folder))  # before the model, which may have to be downloaded
    pretrained = arguments.pretrained == "true"
    if not pretrained:
        # The same ones in each call, or nobody could go on with a store.
        torch.manual_seed(0)
        _say("WEIGHTS ARE RANDOM (--pretrained false): these features say nothing about the pictures.")
    backbone = create_backbone(
        arguments.model,
        layers=arguments.layers,
        pretrained=pretrained,
        image_size=None if size is None else (size[0], size[-1]),
        device=arguments.device or ("cuda" if torch.cuda.is_available() else None),
    )
    bad = extract_folder(
        arguments.folder,
        backbone.freeze(),
        arguments.out,
        dtype=_DTYPES.get(arguments.dtype),
        batch_size=arguments.batch_size,
        shard_size=arguments.shard_size,
        num_workers=arguments.workers,
        notes={"model": arguments.model, "pretrained": pretrained},
        report=_Progress(),
    )
    print(f"{len(FeatureStore(arguments.out)):,} pictures in {arguments.out}, layers {backbone.layers}")
    if bad:
        shown = ", ".join(list(bad)[:10]) + (", …" if len(bad) > 10 else "")
        raise InputError(
            f"{len(bad)} of {total} pictures could not be read: {shown}. The others are in the store; mend or remove "
            "these, then start the same command again."
        )


def _layer(text: str) -> int | float:
    """Read a layer as `create_backbone` takes it: a number, or with a point a share of the depth."""
    return float(text) if "." in text else int(text)


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


class _Progress:
    """One line that is written over on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        self._started = self._shown = time.monotonic()
        self._before: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        terminal, last = sys.stderr.isatty(), done == total
        if self._before is None:
            self._before = done
        if not (terminal or last or now - self._shown >= _PATIENCE):
            return
        self._shown = now
        speed = (done - self._before) / (now - self._started)
        left = f", {(total - done) / speed:,.0f} s left" if speed and not last else ""
        _say(f"{chr(13) * terminal}{done:,} of {total:,} pictures{left}   ", end="\n" if last or not terminal else "")
