"""docs/train_on_your_data.md: its commands run as they stand there, and what they promise comes true."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.__main__ import main
from integrations.llava._files import json_lines
from integrations.llava.config import load_recipe
from integrations.llava.synthetic import make_dataset
from integrations.llava.training import train
from tests.integrations.llava.training.process_pairs import Nursery
from tests.source_support import ROOT

PAGE = (ROOT / "docs" / "train_on_your_data.md").read_text(encoding="utf-8")
MODEL = Path("runs/demo/runs/mmfuser-seed0")


def commands() -> list[list[str]]:
    """Arguments of the page's commands behind the program's name, in their order."""
    typed = re.findall(r"^\$ python -m integrations\.llava ((?:.*\\\n)*.*)", PAGE, re.MULTILINE)
    return [shlex.split(line.replace("\\\n", " ")) for line in typed]


TRAIN = next(command for command in commands() if command[0] == "train" and "--dry-run" not in command)

SHORT = ("--finetune.epochs", "2", "--finetune.log_every", "1")


@pytest.fixture(scope="module")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as the demo trains it, with fewer steps."""
    folder = tmp_path_factory.mktemp("demo")
    data = make_dataset(folder / "data", num_train=200, num_val=1, num_test=1)
    settings: dict[str, Any] = {}
    for stage, file, steps in (("pretrain", "pretrain.json", 30), ("finetune", "train.json", 40)):
        said = {"data.path": data / file, "data.image_folder": data / "images", "max_steps": steps, "batch_size": 8}
        settings |= {f"{stage}.{key}": str(value) if isinstance(value, Path) else value for key, value in said.items()}
    train(load_recipe("tiny", settings), folder / "model")
    return folder / "model"


@pytest.fixture
def own(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the page's first two sections were done."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo_model, MODEL)
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(block, "docs/train_on_your_data.md", "exec"), {})
    return tmp_path


def rows(run: Path, key: str) -> list[dict[str, Any]]:
    return [row for _, row in json_lines(run / "metrics.jsonl") if key in row]


def held_out(run: Path) -> list[float]:
    return [row["eval_loss"] for row in rows(run, "eval_loss")]


def test_the_page_s_commands_lead_from_own_samples_to_an_answer(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [command[0] for command in commands()] == ["demo", "data", "train", "train", "runs", "plot", "generate"]
    said = {}
    for command in commands()[1:]:
        assert main(command) == 0, command
        said[command[0]] = capsys.readouterr().out
    assert said["data"].strip() in PAGE
    first, *_, last = held_out(Path("runs/own"))
    assert last < 0.9 * first
    assert "runs/own" in said["runs"] and "finished" in said["runs"]
    assert Path("runs/own/loss.png").read_bytes().startswith(b"\x89PNG")
    assert all("lamp is" in answer for answer in said["generate"].splitlines())


def test_a_run_that_ctrl_c_stopped_has_the_losses_of_one_that_ran_through(own: Path, nursery: Nursery) -> None:
    # The other process has another working directory.
    short = [str(Path(word).absolute()) if Path(word).exists() else word for word in (*TRAIN, *SHORT)]
    assert main([*short, "--output", "runs/whole"]) == 0
    with nursery.alone("distributed_worker:command", [*short, "--output", str(own / "runs/stopped")]) as process:
        while not (Path("runs/stopped/metrics.jsonl").is_file() and rows(Path("runs/stopped"), "loss")):
            assert process.runs(), process.wait()
            time.sleep(0.01)
        process.send(signal.SIGINT)
        ended = process.wait()
    assert ended.code == 130, ended
    assert len(rows(Path("runs/stopped"), "loss")) < 10
    assert main([*short, "--output", "runs/stopped"]) == 0
    whole, stopped = (json.dumps(rows(Path("runs") / name, "step")) for name in ("whole", "stopped"))
    assert whole == stopped


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_held_out_loss_falls_with_every_seed(own: Path, seed: int) -> None:
    assert main([*TRAIN, "--finetune.seed", str(seed)]) == 0
    first, *_, last = held_out(Path("runs/own"))
    assert last <= 0.9 * first
