"""What is asked of the hub and cannot be had: one line that says what, why, and what to do, whatever the family."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants, errors

from layerfuse import FusedEncoder, create_backbone
from layerfuse._hub import why_not_fetched
from layerfuse.cli import main
from layerfuse.errors import UserError
from tests.analysis.looking_support import write_pictures

NAMES = (
    "timm:vit_tiny_patch16_224.augreg_in21k",
    "timm:hf-hub:nobody/nothing",
    "timm:local-dir:/nowhere",
    "open_clip:ViT-B-32/openai",
    "open_clip:hf-hub:nobody/nothing",
    "transformers:nobody/nothing",
    "transformers:/nowhere",
)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let huggingface_hub ask no network, and find an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", NAMES)
def test_what_the_hub_does_not_give_is_told_in_one_line(name: str) -> None:
    with pytest.raises(UserError) as error:
        create_backbone(name, layers=-1)
    message = str(error.value)
    assert "\n" not in message
    assert name.rpartition(":")[2].partition("/")[0] in message
    assert any(why in message for why in ("HF_HUB_OFFLINE is set", "neither a folder nor a name", "not found"))
    assert "give" in message or "pretrained=False" in message
    assert error.value.__cause__ is not None


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("command", ["maps", "contributions", "similarity", "probe", "suggest", "extract", "inspect"])
def test_every_command_ends_with_that_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = str(write_pictures(tmp_path / "photos", 5)), str(tmp_path / "out")
    model = "timm:hf-hub:nobody/nothing"
    rest = {
        "extract": (folder, "--model", model, "--layers", "-1", "--out", out),
        "inspect": (model,),
    }.get(command, (model, folder, "--output", out))
    assert main([command, *rest]) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith(f"layerfuse {command}: timm cannot load 'hf-hub:nobody/nothing'")
    assert "\n" not in told


@pytest.mark.usefixtures("offline")
def test_an_encoder_that_the_hub_does_not_give_is_told_in_one_line() -> None:
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE is set.*save_pretrained") as error:
        FusedEncoder.from_pretrained("nobody/nothing")
    assert "\n" not in str(error.value)


def test_the_nearest_cause_that_says_something_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for kind, why in (
        (errors.GatedRepoError, "granted access"),
        (errors.RepositoryNotFoundError, "no repository of this name"),
        (errors.RevisionNotFoundError, "no such revision"),
        (errors.RemoteEntryNotFoundError, "lacks a file"),
    ):
        outer = OSError("many\nlines")
        outer.__cause__ = kind.__new__(kind)  # the constructor wants an answer of the hub's own HTTP library
        assert why in why_not_fetched(outer)
    assert "cannot be reached" in why_not_fetched(errors.LocalEntryNotFoundError("no copy"))
    assert why_not_fetched(OSError(28, "No space left\non device.")) == "[Errno 28] No space left on device"
