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
    parser.add_argument("--condition", type=int, default=4096, help="width of the text embedding, where one is read")
    parser.add_argument("--time", action="store_true", help="also run each fuser once on one image")
    args = parser.parse_args()

    grid = (args.grid[0], args.grid[1])
    features = random_features(args.channels, num_layers=args.layers, grids=grid, batch_size=1)
    print(f"{'fuser':<18} {'parameters':>12} {'tokens':>7} {'channels':>9} {'GFLOPs':>8}" + "  seconds" * args.time)
    condition = torch.randn(1, args.condition)
    for name in FUSERS:
        asked = "condition_channels" in FUSERS.get(name).option_parameters()
        options = {"condition_channels": args.condition} if asked else {}
        # On the meta device nothing is allocated: counting is free for models of any size.
        with torch.device("meta"):
            fuser = create_fuser(name, in_channels=args.channels, num_layers=args.layers, options=options)
            cost = fuser.cost((grid,) * args.layers)
        row = f"{name:<18} {cost.parameters:>12,} {cost.num_tokens:>7} {cost.out_channels:>9} {cost.flops / 1e9:>8.2f}"
        if args.time:
            fuser = create_fuser(name, in_channels=args.channels, num_layers=args.layers, options=options).eval()
            with torch.no_grad():
                fuser(features, condition if asked else None)
                started = time.perf_counter()
                fuser(features, condition if asked else None)
            row += f" {time.perf_counter() - started:>8.4f}"
        print(row)


if __name__ == "__main__":
    main()
