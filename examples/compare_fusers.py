"""What each fuser costs on the backbone of LLaVA-1.5 (CLIP ViT-L/14, 336 pixels, five layers), before anything is run.

Run:
    python examples/compare_fusers.py
    python examples/compare_fusers.py --channels 768 --grid 14 14 --layers 4 --time
"""

from __future__ import annotations

import argparse
import time

import torch

from layerfuse import FUSERS, create_fuser
from layerfuse.testing import random_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=1024, help="width of the maps")
    parser.add_argument("--grid", type=int, nargs=2, default=[24, 24], metavar=("H", "W"), help="in patches")
    parser.add_argument("--layers", type=int, default=5, help="number of maps")
    parser.add_argument("--time", action="store_true", help="also run each fuser once on one image")
    args = parser.parse_args()

    grid = (args.grid[0], args.grid[1])
    features = random_features(args.channels, num_layers=args.layers, grids=grid, batch_size=1)
    print(f"{'fuser':<12} {'parameters':>12} {'tokens':>7} {'channels':>9} {'GFLOPs':>8}" + "  seconds" * args.time)
    for name in FUSERS:
        # On the meta device nothing is allocated: counting is free for models of any size.
        with torch.device("meta"):
            cost = create_fuser(name, in_channels=args.channels, num_layers=args.layers).cost((grid,) * args.layers)
        row = f"{name:<12} {cost.parameters:>12,} {cost.num_tokens:>7} {cost.out_channels:>9} {cost.flops / 1e9:>8.2f}"
        if args.time:
            fuser = create_fuser(name, in_channels=args.channels, num_layers=args.layers).eval()
            with torch.no_grad():
                fuser(features)
                started = time.perf_counter()
                fuser(features)
            row += f" {time.perf_counter() - started:>8.4f}"
        print(row)


if __name__ == "__main__":
    main()
