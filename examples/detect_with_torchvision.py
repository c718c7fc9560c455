"""torchvision's Faster R-CNN on the feature pyramid of a Vision Transformer, whose layers a fuser joins.

Run:
    python examples/detect_with_torchvision.py --steps 20
"""

from __future__ import annotations

import argparse

import torch
from torchvision.models.detection import FasterRCNN

import layerfuse
from layerfuse.dense import DetectionBackbone

SIZE = 96


def squares(count: int) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Return dark pictures (3, SIZE, SIZE), 0 to 1, with a bright square each, and their boxes in pixels."""
    pictures, targets = [], []
    for _ in range(count):
        edge = int(torch.randint(24, 48, ()))
        top, left = torch.randint(SIZE - edge, (2,)).tolist()
        picture = 0.2 * torch.rand(3, SIZE, SIZE)
        picture[:, top : top + edge, left : left + edge] += 0.7
        box = torch.tensor([[left, top, left + edge, top + edge]], dtype=torch.float32)
        pictures.append(picture)
        targets.append({"boxes": box, "labels": torch.tensor([1])})
    return pictures, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of training")
    args = parser.parse_args()
    torch.manual_seed(0)

    # Random weights, so that nothing is downloaded. A backbone alone does, too: tap one layer, or four.
    encoder = layerfuse.create_encoder(
        "timm:vit_tiny_patch16_224", layers=(3, 6, 9, -1), fuser="mmfuser", image_size=SIZE, pretrained=False
    ).freeze_backbone()

    # The detector prepares pictures itself: as the backbone wants them, and of the one size that it takes.
    wanted = encoder.preprocessing
    detector = FasterRCNN(
        DetectionBackbone(encoder, out_channels=64),
        num_classes=2,
        image_mean=wanted.mean,
        image_std=wanted.std,
        fixed_size=(SIZE, SIZE),
        size_divisible=1,
    )
    maps = detector.backbone(torch.zeros(1, 3, SIZE, SIZE))
    print("maps", {name: tuple(level.shape[1:]) for name, level in maps.items()})

    optimizer = torch.optim.AdamW([weight for weight in detector.parameters() if weight.requires_grad], lr=3e-4)
    for step in range(args.steps):
        losses = detector(*squares(2))
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1}: loss {loss.item():.3f}")

    pictures, _ = squares(1)
    (found,) = detector.eval()(pictures)
    print("boxes found in a new picture:", len(found["boxes"]))


if __name__ == "__main__":
    main()
