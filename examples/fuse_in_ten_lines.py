"""From a picture to fused visual tokens in ten lines.

Run:
    python examples/fuse_in_ten_lines.py                  # random weights, offline
    python examples/fuse_in_ten_lines.py photo.jpg        # a picture of your own
"""

from __future__ import annotations

import sys

import torch
from PIL import Image

import layerfuse

picture = Image.open(sys.argv[1]) if len(sys.argv) > 1 else Image.radial_gradient("L")
encoder = layerfuse.create_encoder(
    "timm:vit_tiny_patch16_224",
    layers=(3, 6, 9, -2),
    fuser="mmfuser",
    pretrained=False,
)
images = encoder.prepare(picture)
with torch.no_grad():
    tokens = encoder(images)
print("image", tuple(images.shape), "-> tokens", tuple(tokens.shape))
print(encoder.cost())
