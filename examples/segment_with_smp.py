"""A U-Net of segmentation_models_pytorch on several layers of a Vision Transformer that stays frozen.

Run:
    pip install "layerfuse[segmentation]"
    python examples/segment_with_smp.py --steps 20
"""

from __future__ import annotations

import argparse

import segmentation_models_pytorch as smp
import torch

import layerfuse
from layerfuse.dense import SegmentationEncoder

SIZE = 64


def squares(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return noise with a bright square each, (B, 3, SIZE, SIZE), and which pixels are of it, (B, SIZE, SIZE)."""
    pictures, labels = torch.randn(count, 3, SIZE, SIZE), torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for picture, label in zip(pictures, labels, strict=True):
        top, left = torch.randint(SIZE // 2, (2,)).tolist()
        label[top : top + SIZE // 2, left : left + SIZE // 2] = 1
        picture += 2 * label
    return pictures, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of training")
    args = parser.parse_args()
    torch.manual_seed(0)

    # Random weights, so that nothing is downloaded. Without a fuser, tap four layers: one for each stride.
    encoder = layerfuse.create_encoder(
        "timm:vit_tiny_patch16_224", layers=(3, 6, 9, -1), fuser="mmfuser", image_size=SIZE, pretrained=False
    ).freeze_backbone()

    smp.encoders.encoders["fused-vit"] = {
        "encoder": SegmentationEncoder,
        "pretrained_settings": {},
        "params": {"encoder": encoder, "width": 64},
    }
    model = smp.Unet("fused-vit", encoder_weights=None, classes=2, decoder_channels=(64, 48, 32, 16, 16))
    print("maps of", [tuple(level.shape[1:]) for level in model.encoder(torch.zeros(1, 3, SIZE, SIZE))])

    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-3)
    for step in range(args.steps):
        pictures, labels = squares(4)
        loss = torch.nn.functional.cross_entropy(model(pictures), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")

    pictures, labels = squares(8)
    right = (model.eval()(pictures).argmax(1) == labels).float().mean()
    print(f"pixels of new pictures that are right: {right:.0%}")


if __name__ == "__main__":
    main()
