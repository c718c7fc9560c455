"""Find what is wrong in a picture by comparing its patches with those of good pictures, as PatchCore does.

Run:
    python examples/find_anomalies.py --model vit_tiny_patch16_224 --layers 3 6
"""

from __future__ import annotations

import argparse

import torch

import layerfuse
from layerfuse.patches import patch_features

SIZE, PATCH = 128, 16


def stripes(count: int) -> torch.Tensor:
    """Return pictures of slanting stripes with some noise, (B, 3, SIZE, SIZE), each at another phase."""
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    phases = 6.3 * torch.rand(count, 1, 1, 1)
    return torch.sin(0.4 * (rows + columns) + phases) + 0.1 * torch.randn(count, 3, SIZE, SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="name of a timm Vision Transformer")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 6], help="whose maps are compared")
    parser.add_argument("--pretrained", action="store_true", help="download weights; else they are random")
    args = parser.parse_args()
    torch.manual_seed(0)

    backbone = layerfuse.create_backbone(
        f"timm:{args.model}", layers=args.layers, image_size=SIZE, pretrained=args.pretrained
    )

    def patches(pictures: torch.Tensor) -> torch.Tensor:
        """Return (B, N, C) features of the patches."""
        with torch.no_grad():
            return patch_features(backbone(pictures)).flatten(2).transpose(1, 2)

    # PatchCore keeps a selection (a coreset) of these; a few pictures need none.
    memory = patches(stripes(16)).flatten(0, 1)
    print("patches in memory, channels:", tuple(memory.shape))

    broken = stripes(1)
    row, column = 5, 2
    square = (..., slice(row * PATCH, (row + 1) * PATCH), slice(column * PATCH, (column + 1) * PATCH))
    broken[square] = broken[square].flip(-1)  # the stripes slant the other way

    # How unlike a patch is: its distance to the most similar one in memory, smoothed, since neighbours share features.
    distances = torch.cdist(patches(broken)[0], memory).min(1).values.view(1, *backbone.grid(SIZE, SIZE))
    unlike = torch.nn.functional.avg_pool2d(distances, 3, 1, 1)[0]
    for line in (unlike / unlike.max()).tolist():
        print(" ".join(f"{value:.2f}" for value in line))
    found = divmod(int(unlike.argmax()), unlike.shape[1])
    print(f"planted at row {row}, column {column}; most unlike: row {found[0]}, column {found[1]}")


if __name__ == "__main__":
    main()
