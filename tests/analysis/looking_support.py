"""Small pictures on disk, and the demo's backbone, for the commands that look at them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

BACKBONE = "transformers:" + str(
    Path(__file__).resolve().parents[2] / "integrations" / "llava" / "synthetic" / "assets" / "backbone"
)


def write_pictures(folder: Path, count: int, *, brightness: int = 0, seed: int = 0) -> Path:
    """Write pictures of 64×64 pixels whose blocks are grey noise, brighter by a number of grey levels."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed)
    for index in range(count):
        blocks = noise.integers(0, 120, (8, 8, 3), dtype=np.uint8) + np.uint8(brightness)
        Image.fromarray(blocks).resize((64, 64), Image.Resampling.BILINEAR).save(folder / f"{index}.png")
    return folder
