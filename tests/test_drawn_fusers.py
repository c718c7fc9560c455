"""The picture of docs/fusers.md shows every fuser, is opaque, and is small."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from layerfuse import fusers

pytest.importorskip("matplotlib")
from tools.draw_fusers import PANELS, draw_fusers


def test_every_fuser_has_a_panel() -> None:
    ours = [entry for entry in vars(fusers).values() if isinstance(entry, type) and issubclass(entry, fusers.Fuser)]
    assert sorted(PANELS) == sorted(entry.name for entry in ours if entry is not fusers.Fuser)


def test_the_picture_is_opaque_small_and_the_one_in_the_docs(tmp_path: Path) -> None:
    draw_fusers(tmp_path / "fusers.png")
    stored = Path(__file__).parents[1] / "docs" / "fusers.png"
    assert stored.stat().st_size < 100_000
    with Image.open(tmp_path / "fusers.png") as drawn, Image.open(stored) as kept:
        assert drawn.size == kept.size and "transparency" not in kept.info
        assert kept.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
