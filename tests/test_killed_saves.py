"""A saver that is killed at any moment leaves the old model, the new one, or nothing that loads."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.integrations.llava.inference.answering_parts import save_run
from tests.integrations.llava.tiny_parts import save_backbone
from tests.run_support import run_python
from tests.source_support import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="savers are forked")


@pytest.fixture(scope="module", params=["encoder", "llava"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What killed savers left, by kind of model."""
    folder = tmp_path_factory.mktemp("killed")
    if request.param == "llava":
        backbone = save_backbone(folder / "backbone")
        for name, width in (("one", 16), ("other", 32)):
            save_run(folder / name, backbone, width=width)
    output = run_python(str(ROOT / "tests" / "killed_saver.py"), request.param, ".", folder=folder)
    content: dict[str, Any] = json.loads(output.splitlines()[-1])
    return content


def test_savers_killed_at_random_moments_leave_a_whole_model_or_a_worded_refusal(found: dict[str, Any]) -> None:
    assert len(found["random"]) >= 30
    assert {name[:7] for name in found["random"]} <= {"A", "B", "refused"}
    assert {"A", "B"} <= {*found["random"]}


def test_savers_killed_at_every_step_leave_a_whole_model_or_a_worded_refusal(found: dict[str, Any]) -> None:
    assert {name[:7] for name in found["numbered"]} == {"A", "B", "refused"}
    assert found["numbered"][0] == "A" and found["numbered"][-1] == "B"
    refusals = [text for text in found["numbered"] if text.startswith("refused")]
    assert all("holds no config.json" in text and "A save into this folder was killed" in text for text in refusals)
    assert any("move the earlier model's files back from .replaced-" in text for text in refusals)


def test_a_save_after_killed_ones_leaves_nothing_of_them(found: dict[str, Any]) -> None:
    assert found["last"] == "B"
    assert found["hidden"] == []
