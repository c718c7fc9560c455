"""The command `layerfuse`: what a backbone is, what fusers cost on it, which names there are."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from layerfuse.cli import main

EVA = "timm:eva02_large_patch14_clip_336"


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_inspect_tells_facts_and_cost_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "inspect", EVA, "--layers", "3", "8", "13", "18", "23")
    facts = dict(line.strip().split("  ", 1) for line in text.splitlines() if line.startswith("  "))
    facts = {key: value.strip() for key, value in facts.items()}
    assert facts["depth"].startswith("24 blocks")
    assert facts["width"].startswith("1,024")
    assert facts["grid"] == "24×24, 576 patch tokens"
    assert facts["prefix tokens"] == "1"
    assert text.splitlines()[-1].split() == [
        "mmfuser",
        *["3", "8", "13", "18", "23"],
        "5,190,592",
        "576",
        "1,024",
        "9.68",
    ]


def test_inspect_compares_every_fuser_and_says_why_one_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("inspect", "timm:vit_tiny_patch16_224", "--fuser", "every", "--image-size", "96", "64", "--json")
    told = json.loads(shown(capsys, *arguments))
    assert (told["depth"], told["grid"], told["image_size"]) == (12, [6, 4], [96, 64])
    fusers = {cost["name"]: cost for cost in told["fusers"]}
    assert "condition_channels" in fusers.pop("text_gated")["why_not"]
    assert fusers["select"]["parameters"] == 0
    assert fusers["concat"]["out_channels"] == 192 * len(fusers["concat"]["layers"])
    assert fusers["token_concat"]["num_tokens"] == 24 * len(fusers["token_concat"]["layers"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("inspect", "vit_tiny_patch16_224"), "says no family"),
        (("inspect", EVA, "--fuser", "mmfusr"), "did you mean 'mmfuser'"),
        (("inspect", "timm:vit_tiny_patch16_224", "--layers", "3", "13"), "layer 13 is outside this backbone"),
        (("inspect", "timm:vit_tiny_patch16_224", "--image-size", "1", "2", "3"), "give one edge, or height and width"),
        (("models", "tim:*"), "did you mean 'timm'"),
        (("models", "timm:vit_nano"), "no name is like 'timm:vit_nano'; write * for what may come before and behind"),
    ],
)
def test_a_wrong_word_is_answered_in_one_line(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert says in capsys.readouterr().err


def test_inspect_tells_the_stages_of_a_hierarchical_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "inspect", "timm:swin_tiny_patch4_window7_224")
    assert re.search(r"width +96, 192, 384, 768 channels", text)
    assert re.search(r"layers 5 … 10 +14×14, 196 patch tokens, 384 channels, stride 16×16 pixels", text)
    assert "mmfuser: fuser 'mmfuser' got maps of widths" in text
    arguments = ("inspect", "timm:swin_tiny_patch4_window7_224", "--layers", "6", "8", "10", "--json")
    told = json.loads(shown(capsys, *arguments))
    assert told["stages"][1] == {"layers": [3, 4], "width": 192, "stride": [8, 8], "grid": [28, 28]}
    assert told["fusers"][0]["num_tokens"] == 14 * 14


def test_models_lists_names_that_inspect_takes(capsys: pytest.CaptureFixture[str]) -> None:
    names = shown(capsys, "models", "timm:vit_tiny_patch16_*224*").split()
    assert names and all(name.startswith("timm:vit_tiny_patch16") for name in names)
    assert json.loads(shown(capsys, "inspect", names[0], "--fuser", "select", "--json"))["width"] == 192


def test_the_module_is_the_command(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "layerfuse", "--help"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=600)
    assert "inspect" in result.stdout and "models" in result.stdout
