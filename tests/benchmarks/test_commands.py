"""The commands run to their end at tiny size; what they measure there means nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.command import TOPICS, execute
from benchmarks.report import draw_op, draw_scaling, fill_in, read_rows, table
from tests.source_support import ROOT


def dry_run(device: str, *topics: str, folder: Path) -> dict[str, Any]:
    report = folder / "out.json"
    arguments = ["--dry-run", "--json", str(report), "--output", str(folder / "rows.jsonl")]
    for topic in topics:
        arguments += ["--only", topic]
    assert execute(goals_of=device, arguments=arguments) == 0
    told: dict[str, Any] = json.loads(report.read_text())
    assert [row for row in told["rows"] if row.get("status") == "failed"] == []
    return told


def test_every_topic_is_a_module_with_a_command_of_its_own() -> None:
    for topic in {topic for topics in TOPICS.values() for topic in topics}:
        text = (ROOT / "benchmarks" / f"{topic}.py").read_text()
        assert f'main("{topic}")' in text
        assert f"python -m benchmarks.{topic}" in text


def test_the_cpu_op_and_every_fuser_run_dry(tmp_path: Path) -> None:
    told = dry_run("cpu", "op", "scaling", folder=tmp_path)
    goals = {goal["goal"]: goal for goal in told["goals"]}
    assert {"op-forward", "op-forward+backward", "op-memory-forward", "op-bf16", "scaling-tokens"} <= goals.keys()
    assert goals["op-forward"]["rows"] == 1
    assert all(goal["outcome"] in ("PASS", "FAIL") for goal in goals.values())
    written = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert len(written) == len(told["rows"]) > 40


def test_the_gpu_op_runs_dry(tmp_path: Path) -> None:
    told = dry_run("cuda", "op", folder=tmp_path)
    oracle = [row for row in told["rows"] if row["benchmark"] == "op oracle"]
    assert oracle and all(row["right"] for row in oracle)
    assert {"transformers, compiled", "dense SDPA over all keys"} <= {row["candidate"] for row in told["rows"]}


def test_the_choice_of_paths_and_blocks_says_which_is_the_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import op_choice
    from layerfuse.ops.deformable import triton

    # On a CPU gather takes Triton's place, which does not matter to what is tried here.
    monkeypatch.setattr(op_choice, "can_run", lambda *_: True)
    before = triton.FORWARD_BLOCKS, triton.BACKWARD_BLOCKS
    told = dry_run("cuda", "op_choice", folder=tmp_path)
    rows = {name: [row for row in told["rows"] if row["benchmark"] == name] for name in ("op choice", "op blocks")}
    for name, chosen in (("op choice", "auto"), ("op blocks", "as set")):
        said = [row for row in told["rows"] if row["benchmark"] == f"{name}, of the fastest"]
        assert len(said) == 2, "forward, forward and backward"
        for row in said:
            times = {own["candidate"]: own["median_seconds"] for own in rows[name] if own["case"] == row["case"]}
            assert row["candidate"] == chosen and times[row["fastest"]] == min(times.values())
            assert row["value"] == pytest.approx(times[chosen] / min(times.values()), rel=1e-3)
    assert {"gather", "reference"} <= {row["candidate"] for row in rows["op choice"]}
    assert {goal["goal"] for goal in told["goals"] if goal["rows"]} >= {"auto-is-fastest", "blocks-are-best"}
    assert before == (triton.FORWARD_BLOCKS, triton.BACKWARD_BLOCKS)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_whole_command_runs_dry(device: str, tmp_path: Path) -> None:
    told = dry_run(device, folder=tmp_path)
    absent = {goal["goal"] for goal in told["goals"] if goal["outcome"] == "not measured"}
    assert absent <= {"op-forward-deformops", "op-forward+backward-deformops", "blocks-are-best"}


def test_strict_turns_a_failed_goal_into_an_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import scaling

    def run(session: Any) -> None:
        session.record("exponent in tokens", "linear", value=2.0)

    monkeypatch.setattr(scaling, "run", run)
    assert execute("scaling", arguments=["--dry-run"]) == 0
    assert execute("scaling", arguments=["--dry-run", "--strict"]) == 1


def test_the_old_command_says_what_took_its_place() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/run.py", "--only", "op"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "python -m benchmarks.cpu" in done.stderr


def test_the_page_gets_pictures_and_verdicts_of_full_runs(tmp_path: Path) -> None:
    common = {"scale": "full", "hardware": "a processor, 2 cores", "case": "x"}
    common |= {"versions": {"torch": "2.14"}, "commit": "abc"}
    rows = [
        {"benchmark": "exponent in tokens", "candidate": "linear", "axis": "tokens", "fuser": "average", "value": 1.0}
        | {"sizes": [1, 2], "seconds": [1.0, 2.0], **common},
        {"benchmark": "op forward", "candidate": "auto", "batch_size": 1, "grid": [4, 4], "median_seconds": 1.0}
        | common,
        {"benchmark": "op forward", "candidate": "gather", "scale": "quick"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_rows([path])
    assert len(read) == 2
    (scaling,), (op,) = draw_scaling(read, tmp_path), draw_op(read, tmp_path)
    assert "average (1.00)" in scaling.read_text()
    assert "auto" in op.read_text()
    assert draw_op([], tmp_path) == []
    written = table(read, "cpu")
    assert "| scaling-tokens | – | 1 | ≤ 1.1 | PASS | x |" in written
    assert "a processor, 2 cores, torch 2.14, commit abc" in written
    page = "before\n<!-- cpu -->\nold\n<!-- /cpu -->\nafter\n"
    assert fill_in(page, "cpu", "new") == "before\n<!-- cpu -->\nnew\n<!-- /cpu -->\nafter\n"


def test_the_page_has_a_place_for_each_device() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    for device in ("cpu", "cuda"):
        assert "new text" in fill_in(page, device, "new text")
