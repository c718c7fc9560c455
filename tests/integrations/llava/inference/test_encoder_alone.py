"""The encoder inside a saved model, taken out as docs/analysis.md says, for the commands of layerfuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.testing import assert_close

from integrations.llava import load_model
from layerfuse import FusedEncoder
from layerfuse.cli import main
from tests.analysis.looking_support import write_pictures
from tests.integrations.llava.inference.answering_parts import save_run


def test_the_encoder_of_a_saved_model_goes_into_the_commands(
    backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run", backbone_folder)
    pictures = write_pictures(tmp_path / "photos", 1)
    assert main(["contributions", str(run), str(pictures), "--output", str(tmp_path / "out")]) == 2
    assert "save its FusedEncoder first: docs/analysis.md says how" in capsys.readouterr().err
    model = load_model(run).model
    FusedEncoder(model.vision_tower.backbone, model.fuser).save_pretrained(tmp_path / "encoder")
    saved = FusedEncoder.from_pretrained(tmp_path / "encoder")
    assert_close(saved.fuser.state_dict(), model.fuser.state_dict())
    assert main(["contributions", str(tmp_path / "encoder"), str(pictures), "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "numbers.json").read_text())["layers"] == [1, 2, 3, 4]
