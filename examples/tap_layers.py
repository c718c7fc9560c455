"""Tap layers of any Vision Transformer: one that you hold, or one cut after the deepest tapped layer.

Run:
    python examples/tap_layers.py --model vit_tiny_patch16_224 --layers 3 8 -2
"""

from __future__ import annotations

import argparse

import timm
import torch

import layerfuse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="name of a timm Vision Transformer")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 8, -2], help="0 = embeddings, -2 = penultimate")
    args = parser.parse_args()

    # A model that you hold stays whole: hooks come and go with the `with` block.
    model = timm.create_model(args.model, pretrained=False).eval()
    height, width = model.patch_embed.img_size
    images = torch.randn(2, 3, height, width)
    with torch.no_grad(), layerfuse.tap(model, layers=args.layers) as tapped:
        logits = model(images)
    features = tapped.features(grid=model.patch_embed.grid_size, num_prefix_tokens=model.num_prefix_tokens)
    print("logits, as ever:", tuple(logits.shape))
    for layer, grid, feature_map in zip(features.layers, features.grids, features.maps, strict=True):
        print(f"layer {layer}: map {tuple(feature_map.shape)} on a grid of {grid[0]}x{grid[1]} patches")

    # A backbone is the same model, cut after the deepest tapped layer: nothing runs that nobody reads.
    backbone = layerfuse.create_backbone(f"timm:{args.model}", layers=args.layers, pretrained=False)
    backbone.load_state_dict({f"model.{key}": value for key, value in model.state_dict().items()}, strict=False)
    with torch.no_grad():
        again = backbone(images)
    same = all(torch.equal(one, other) for one, other in zip(features.maps, again.maps, strict=True))
    print(f"the backbone runs {max(backbone.layers)} of {backbone.num_blocks} blocks; same maps: {same}")


if __name__ == "__main__":
    main()
