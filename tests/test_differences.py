"""docs/differences.md: every test it names is there, and so is every recorded row."""

from __future__ import annotations

import json
import re

import pytest
import torch

from layerfuse.features import FeatureMaps
from layerfuse.fusers import create_fuser
from tests.goldens_support import ROOT, SHARED

TEXT = (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")


def test_every_test_that_is_named_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", TEXT))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))

    assert named
    assert named <= set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))


@pytest.mark.skipif(not SHARED.is_dir(), reason="goldens not found; set LAYERFUSE_GOLDENS to their folder")
def test_every_row_that_goldens_drop_by_accident_is_named() -> None:
    recorded = json.loads((SHARED / "preprocess" / "conversations.json").read_text(encoding="utf-8"))
    from tests.integrations.llava.prompts.test_prompts_goldens import DROPPED_BY_ACCIDENT

    rows = {row["id"]: row for rows in recorded.values() for row in rows}
    assert all(f"`{name}`" in TEXT for name in DROPPED_BY_ACCIDENT)
    assert all(rows[name].get("all_masked", True) for name in rows.keys() & DROPPED_BY_ACCIDENT.keys())


@pytest.mark.parametrize("num_images", [65, 96])
def test_batches_that_the_published_op_refuses_are_computed(num_images: int) -> None:
    fuser = create_fuser("mmfuser", in_channels=16, num_layers=5)
    for parameter in fuser.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    maps = torch.randn(5, num_images, 4, 16)

    def fuse(images: torch.Tensor) -> torch.Tensor:
        fused: torch.Tensor = fuser(FeatureMaps(maps=tuple(images), layers=(1, 2, 3, 4, 5), grids=((2, 2),) * 5))
        return fused

    with torch.no_grad():
        torch.testing.assert_close(fuse(maps)[-1:], fuse(maps[:, -1:]))
