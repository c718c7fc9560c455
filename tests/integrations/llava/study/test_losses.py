"""Loss curves of several runs, as a picture and as a page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from integrations.llava.cli.plot import main

COUNT = 90


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs below a folder: `a` of both stages, with evaluations in the second, and `b & c` of the second alone."""
    for name, stages in (("a", ("pretrain", "finetune")), ("b & c", ("finetune",))):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        rows = [
            {"stage": stage, "step": step, "loss": 1 + 5 / step + (90.0 if step == 2 else 0)}
            for stage in stages
            for step in range(1, COUNT + 1)
        ]
        if name == "a":
            rows += [{"stage": "finetune", "step": step, "eval_loss": 1.5} for step in (30, 60)]
            rows.append({"stage": "finetune", "step": 90, "eval_loss": float("nan")})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "run.json").write_text("{}")
    return tmp_path / "runs"


def test_the_page_has_a_chart_per_stage_and_each_run_in_its_colour(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out" / "losses.html"
    assert main([str(runs), "--output", str(page)]) == 0
    assert capsys.readouterr().out == f"losses: {page}\n"
    text = page.read_text(encoding="utf-8")
    pretrain, finetune = re.findall(r"<svg class=\"chart\".*?</svg>", text)
    assert pretrain.count("<polyline") == 2
    assert finetune.count("<polyline") == 5
    assert finetune.count("a, evaluation, ") == finetune.count('class="mark c0"') == 2
    # The same colour in both panels, and names as text.
    assert 'class="line c1"' in finetune
    assert "c1" not in re.sub(r"c1\d", "", pretrain)
    assert "b &amp; c" in text and "b & c" not in text
    lines = [
        [tuple(map(float, xy.split(","))) for xy in points.split()] for points in re.findall(r'points="([^"]*)"', text)
    ]
    assert all(0 <= y <= 300 for points in lines for _, y in points if len(points) > 20)


def test_the_picture_is_a_png(runs: Path, tmp_path: Path) -> None:
    file = tmp_path / "losses.png"
    assert main([str(runs / "a"), str(runs / "b & c"), "--output", str(file)]) == 0
    with Image.open(file) as picture:
        assert picture.format == "PNG"
        drawn = {color for _, color in picture.convert("RGB").getcolors(2**24)}
    assert {(0x0B, 0x66, 0xA8), (0xC9, 0x52, 0x0A)} <= drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUNS", "--output", "losses.pdf"], "losses.pdf is neither a picture nor a page; give a name that ends in"),
        (["RUNS/nowhere"], "there is no run in .*nowhere; give the folder of a run"),
        (["RUNS/empty"], "has logged no step .*; give the folder of a run that has made some"),
        (["RUNS/a", "--output", "RUNS/a/run.json/losses.png"], "cannot be written .*; give another --output"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    arguments: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs / "empty").mkdir()
    (runs / "empty" / "run.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        main([each.replace("RUNS", str(runs)) for each in arguments])
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
