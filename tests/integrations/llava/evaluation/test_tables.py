"""The paper's tables, from two tiny checkpoints and made-up data: every number, every word in place of one."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from integrations.llava.cli.data import main as data_command
from integrations.llava.cli.evaluate import main
from integrations.llava.evaluation import TASKS, task_faults
from integrations.llava.evaluation.tables import (
    PAPER_TASKS,
    add_score,
    checkpoint_names,
    chosen_tasks,
    evaluate_tasks,
    write_tables,
)
from integrations.llava.evaluation.tables.bootstrap import draw_numbers
from integrations.llava.evaluation.tables.published import published_models
from integrations.llava.inference.batching import Shard
from integrations.llava.inference.predictor import Predictor
from tests.integrations.llava.evaluation.judge_server import judge_server
from tests.integrations.llava.evaluation.make_fixtures import write_data
from tests.integrations.llava.inference.answering_parts import save_run

TASK_NAMES = ["vqav2", "pope", "mme", "ocrbench", "mm_vet", "refcoco_val"]
SPEED = {"max_new_tokens": 4, "device": "cpu"}


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All benchmarks that need no further package; nobody writes to it."""
    folder = tmp_path_factory.mktemp("benchmarks")
    write_data(folder, parquet=False)
    return folder


@pytest.fixture(scope="module")
def second_run(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint `second` that answers otherwise than `run`."""
    return save_run(tmp_path_factory.mktemp("run") / "second", backbone_folder, seed=1)


class Answers:
    """In place of a model: what two checkpoints say, right in part; counts questions, and ends the process."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.asked, self.last = 0, 10**9

        def answer_batch(own: Predictor, batch: Mapping[str, Any], keys: Any, sampling: Any) -> list[str]:
            if self.asked >= self.last:
                raise KilledError
            self.asked += len(keys)
            # By weights: `second` says yes to all.
            first = own.model.lm_head.weight[-1, 0].item() == self.first
            return ["Yes." if not first or len(key) % 2 else "No, Word 1." for key in keys]

        self.first = 0.0
        patch.setattr(Predictor, "answer_batch", answer_batch)


class KilledError(BaseException):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def answers(run: Path) -> Any:
    """Counts questions."""
    from integrations.llava.inference.predictor import load_predictor

    with pytest.MonkeyPatch.context() as patch:
        own = Answers(patch)
        own.first = load_predictor(run).model.lm_head.weight[-1, 0].item()
        yield own


@pytest.fixture(scope="module")
def made(run: Path, second_run: Path, benchmarks: Path, answers: Answers, tmp_path_factory: Any) -> Path:
    """The tables of both checkpoints, by the command; nobody writes to it."""
    output = tmp_path_factory.mktemp("tables") / "out"
    command = [run, second_run, "--tasks", *TASK_NAMES, "--data", benchmarks, "--output", output]
    assert main([*map(str, command), "--max-new-tokens", "4", "--device", "cpu"]) == 0
    return output


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def rows_of(output: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Lines of the CSV by row and column."""
    lines = csv.DictReader(io.StringIO((output / "tables.csv").read_text(encoding="utf-8")))
    return {(line["key"], line["column"]): line for line in lines}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_cells_hold_numbers_or_the_reason_why_not(made: Path) -> None:
    rows = rows_of(made)
    # Yes to all: half of the twelve labels are yes, in each category.
    assert float(rows["pope", "second"]["value"]) == pytest.approx(100 * 2 / 3, abs=0.01)
    assert float(rows["pope", "second"]["low"]) < 66.6 < float(rows["pope", "second"]["high"])
    assert rows["pope", "second"]["protocol"] == "llava"
    assert rows["pope", "LLaVA-1.5 7B"] | {"value": "85.9", "state": "published"} == rows["pope", "LLaVA-1.5 7B"]
    assert "arXiv 2410.11829" in rows["pope", "MMFuser 7B"]["source"]
    assert rows["pope", "LLaVA-1.5 7B LoRA"]["source"] == "LLaVA, docs/MODEL_ZOO.md"
    assert rows["vqav2", "second"]["state"] == "written" and rows["mm_vet", "tiny"]["state"] == "written"
    assert rows["refcoco_val", "tiny"]["state"] == "missing" == rows["refcoco_val", "second"]["state"]
    assert rows["comprehension:average", "tiny"]["value"] == ""
    assert rows["ocrbench:recognition", "LLaVA-1.5 7B"]["value"] == "160"
    # Yes to all: every image of MME has one question of two right, ten sub-tasks.
    assert rows["mme", "second"]["value"] == "500" and rows["mme:cognition", "second"]["value"] == "200"
    assert rows["mme:cognition", "MMFuser 7B"]["state"] == "unseen"


def test_differences_are_paired_between_checkpoints_and_plain_to_published_numbers(made: Path) -> None:
    rows = rows_of(made)
    for key in ("pope", "mme", "ocrbench"):
        ours, other = (float(rows[key, name]["value"]) for name in ("second", "tiny"))
        between = rows[key, "second − tiny"]
        assert float(between["value"]) == pytest.approx(ours - other, abs=0.01)
        assert float(between["low"]) <= ours - other + 0.01 and ours - other <= float(between["high"]) + 0.01
        published = float(rows[key, "MMFuser 7B"]["value"])
        assert float(rows[key, "second − MMFuser 7B"]["value"]) == pytest.approx(ours - published, abs=0.01)
        assert rows[key, "second − MMFuser 7B"]["low"] == ""
    assert ("vqav2", "second − tiny") not in rows


def test_text_markdown_and_page_say_the_same(made: Path) -> None:
    text, markdown, page = ((made / f"tables.{kind}").read_text(encoding="utf-8") for kind in ("txt", "md", "html"))
    for content in (text, markdown, page):
        assert "submission written" in content and "data missing" in content and "not seen" in content
        assert "66.7" in content and "1510.7" in content and "lmms-lab/RefCOCO" in content
        for title in ("General benchmarks", "OCRBench by category", "Referring expressions"):
            assert title in content
    assert not re.search(r"<script|<link|<img|@import|url\(|src=", page)
    assert "color-scheme:light" in page and "@media print" in page


def test_score_files_name_the_protocol(made: Path) -> None:
    folder = made / "second" / "llava" / "pope"
    assert json.loads((folder / "metrics.json").read_text())["protocol"] == "llava"
    score = json.loads((folder / "score.json").read_text())
    assert score["protocol"] == "llava" and score["num_questions"] == 12
    assert len(score["draws"]["f1"]) == 1000
    assert sorted(path.name for path in (made / "second/llava/vqav2/submission/vqav2").iterdir())


def test_a_servers_score_is_entered_and_marked(copied: Path, second_run: Path, capsys: Any) -> None:
    command = ["--add-score", str(second_run), "vqav2=79.5", "mm_vet=31", "--output", str(copied)]
    assert main(command) == 0
    assert "79.5 (entered)" in capsys.readouterr().out
    row = rows_of(copied)["vqav2", "second"]
    assert (row["state"], row["value"], row["low"]) == ("entered", "79.5", "")
    assert rows_of(copied)["vqav2", "second − MMFuser 7B"]["value"] == "0.4"
    assert rows_of(copied)["vqav2", "tiny"]["state"] == "written"
    assert "79.5 (entered)" in (copied / "tables.html").read_text(encoding="utf-8")

    # A score of other answers than those that are there is none.
    predictions = copied / "second/llava/vqav2/predictions.jsonl"
    predictions.write_text(predictions.read_text().replace("Yes.", "No."))
    write_tables(copied)
    assert rows_of(copied)["vqav2", "second"]["state"] == "written"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["second", "pope=70"], "pope of second is scored here: 0.666667; nothing was entered"),
        (["second", "vqav2=785"], "vqav2=785 is no score; give 0 to 100"),
        (["second", "vqav2"], "'vqav2' is no score; give a task and a number, such as vqav2=78.5"),
        (["second"], "no score was given; give CHECKPOINT and TASK=SCORE"),
        (["third", "vqav2=78"], "has no checkpoint 'third'; it has: tiny, second"),
        (["second", "gqa=60"], "gqa of second under llava is not finished in"),
        (["second", "vqa=60"], "question kind 'vqa' is unknown"),
    ],
)
def test_scores_that_cannot_be_are_refused(entry: list[str], message: str, made: Path, capsys: Any) -> None:
    before = snapshot(made)
    with pytest.raises(SystemExit, match="2"):
        main(["--add-score", *entry, "--output", str(made)])
    assert message in capsys.readouterr().err
    assert snapshot(made) == before


def test_killed_runs_and_three_processes_give_what_one_gives(
    run: Path, benchmarks: Path, answers: Answers, tmp_path: Path
) -> None:
    def process(folder: str, shard: Shard | None = None) -> bool:
        plan = evaluate_tasks(
            [run], names, benchmarks, tmp_path / folder, shard=shard, batch_size=3, num_draws=20, **SPEED
        )
        if plan is not None:
            write_tables(tmp_path / folder)
        return plan is not None

    names = ["vqav2", "pope", "refcoco_val"]
    assert process("whole")
    whole = snapshot(tmp_path / "whole")
    for last in (4, 4):
        answers.asked, answers.last = 0, last
        with pytest.raises(KilledError):
            process("killed")
        assert not (tmp_path / "killed" / "tables.txt").exists()
    answers.last = 10**9
    assert process("killed")
    assert snapshot(tmp_path / "killed") == whole

    answers.asked = 0
    assert [process("shards", Shard(index, 3)) for index in range(3)] == [False, False, True]
    assert snapshot(tmp_path / "shards") == whole
    count, answers.asked = answers.asked, 0
    assert process("shards") and answers.asked == 0 < count


def test_draws_are_made_again_for_other_scores_only(
    run: Path, benchmarks: Path, answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    real = draw_numbers

    def counted(*arguments: Any, **options: Any) -> dict[str, list[float]]:
        drawn.append(arguments[1])
        return real(*arguments, **options)

    monkeypatch.setattr("integrations.llava.evaluation.tables.stored.draw_numbers", counted)
    data = Path(shutil.copytree(benchmarks / "pope", tmp_path / "data/pope")).parent
    for change, expected in (("", 1), ("", 1), ("flip", 2)):
        if change:
            labels = data / "pope/coco/coco_pope_random.json"
            labels.write_text(labels.read_text().replace("yes", "no", 1))
        evaluate_tasks([run], ["pope"], data, tmp_path / "out", num_draws=20, **SPEED)
        assert len(drawn) == expected
    evaluate_tasks([run], ["pope"], data, tmp_path / "out", num_draws=20, overwrite=True, **SPEED)
    assert len(drawn) == 3


def test_a_judges_name_stands_in_the_table(
    run: Path, benchmarks: Path, answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with judge_server(lambda body: "0.5") as server:
        command = [run, "--tasks", "mm_vet", "--data", benchmarks, "--output", tmp_path, "--max-new-tokens", "4"]
        judge = ["--device", "cpu", "--judge", server.url, "--judge-model", "judge"]
        assert main([*map(str, command), *judge]) == 0
        assert len(server.requests) > 0
    row = rows_of(tmp_path)["mm_vet", "tiny"]
    assert row["value"] == "50" and "judge judge (judge-2026)" in row["notes"]
    assert "judge judge (judge-2026)" in (tmp_path / "tables.txt").read_text()


def test_columns_of_two_protocols_are_never_compared(
    run: Path, benchmarks: Path, answers: Answers, copied: Path
) -> None:
    evaluate_tasks([run], ["pope", "vqav2"], benchmarks, copied, protocol="lmms", **SPEED)
    text = write_tables(copied, width=200)
    assert write_tables(copied) == (copied / "tables.txt").read_text(encoding="utf-8") != text
    assert re.search(r"protocol +llava +llava +lmms +llava", text)
    lines = list(csv.DictReader(io.StringIO((copied / "tables.csv").read_text(encoding="utf-8"))))
    pope = [line for line in lines if line["key"] == "pope" and line["column"].startswith("tiny")]
    assert [line["protocol"] for line in pope if line["column"] == "tiny"] == ["llava", "lmms"]
    assert {line["protocol"] for line in pope if "−" in line["column"]} == {"llava"}


def test_data_are_surveyed_beforehand(benchmarks: Path, tmp_path: Path, capsys: Any) -> None:
    folder = Path(shutil.copytree(benchmarks, tmp_path / "data"))
    shutil.rmtree(folder / "gqa/data/images")
    shutil.rmtree(folder / "vizwiz")
    command = ["eval", "--data", str(folder), "--tasks"]
    assert data_command([*command, "pope"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["pope", "complete", "12"]
    assert data_command([*command, "pope", "gqa", "vizwiz"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"gqa +incomplete\n", said) and re.search(r"vizwiz +missing\n", said)
    assert "2 of 2 images are missing" in said and "gqa/data/images: images" in said
    assert "vizwiz/llava_test.jsonl: " in said


def test_data_at_fault_are_refused_before_anything_is_asked(
    run: Path, benchmarks: Path, answers: Answers, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(benchmarks, tmp_path / "data"))
    labels = folder / "pope/coco/coco_pope_random.json"
    labels.write_text("".join(labels.read_text().splitlines(keepends=True)[1:]))
    answers.asked = 0
    with pytest.raises(ValueError, match=r"data of 1 of 2 tasks are at fault; nothing was asked:\n  pope: .* 3 labels"):
        evaluate_tasks([run], ["mme", "pope"], folder, tmp_path / "out", **SPEED)
    with pytest.raises(FileNotFoundError, match="no task has its data; give the folder that holds them as --data"):
        evaluate_tasks([run], ["mme", "pope"], tmp_path, tmp_path / "out", **SPEED)
    assert answers.asked == 0 and not (tmp_path / "out").exists()


def test_published_numbers_are_those_of_tasks_and_have_sources() -> None:
    models = published_models()
    assert [own.name for own in models[:3]] == ["LLaVA-1.5 7B", "LLaVA-1.5 7B LoRA", "MMFuser 7B"]
    for model in models:
        for key, number in model.numbers.items():
            name, _, part = key.partition(":")
            if part == "average":
                assert name in ("caption", "comprehension")
                continue
            assert part in TASKS.get(name).parts or not part
            assert number.source and "llava" in TASKS.get(name).protocols
        parts = [own.value for key, own in model.numbers.items() if key.startswith("ocrbench:")]
        assert not parts or sum(parts) == model.numbers["ocrbench"].value
    average = [own.value for key, own in models[2].numbers.items() if key.startswith("refcoco")]
    assert len(average) == 8
    assert sum(average) / 8 == pytest.approx(models[2].numbers["comprehension:average"].value, abs=0.1)


def test_names_of_tasks_and_checkpoints(tmp_path: Path) -> None:
    assert chosen_tasks(["pope", "paper"])[:2] == ("pope", "vqav2")
    assert set(PAPER_TASKS) <= set(TASKS.names())
    with pytest.raises(ValueError, match="question kind 'papers' is unknown"):
        chosen_tasks(["papers"])
    folders = [tmp_path / "a/run", tmp_path / "b/run", tmp_path / "c"]
    assert checkpoint_names(folders) == dict(zip(["a-run", "b-run", "c"], folders, strict=True))
    with pytest.raises(ValueError, match="checkpoints are given twice"):
        checkpoint_names([tmp_path / "a", tmp_path / "a"])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["a", "--tasks", "pope"], "--tasks asks checkpoints: evaluate CHECKPOINT"),
        (["--tasks", "pope", "--data", "d"], "--tasks asks checkpoints: evaluate CHECKPOINT"),
        (["a", "--tasks", "pope", "--data", "d", "--model", "m"], "not with --model, --predictions, --images"),
        (["a", "--task", "pope", "--image-folder", "d"], "CHECKPOINT… and --data go with --tasks"),
        (["a", "--tasks", "pope", "--data", "d", "--protocol", "x"], "none of these tasks knows the protocol 'x'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(command: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert message in capsys.readouterr().err


def test_scores_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no tables; evaluate checkpoints with --tasks first"):
        add_score(tmp_path, "a", None, {"vqav2": 78.0})


def test_a_task_of_an_installed_package_is_asked_and_shown(
    root: Path, run: Path, answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    site = tmp_path / "site"
    (site / "clocks-1.0.dist-info").mkdir(parents=True)
    (site / "clocks-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: clocks\nVersion: 1.0\n")
    (site / "clocks-1.0.dist-info/entry_points.txt").write_text("[layerfuse.tasks]\nclock = write_a_task:ClockTask\n")
    shutil.copy(root / "examples/write_a_task.py", site)
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(TASKS, "_outside", None)
    monkeypatch.setattr(TASKS, "_entries", dict(TASKS._entries))
    assert "clock" in TASKS.names()
    import write_a_task  # type: ignore[import-not-found]

    write_a_task.draw_clocks(tmp_path / "data", ["1:05", "3:30", "6:45"])
    assert task_faults("clock", tmp_path / "data") == []
    command = [run, "--tasks", "clock", "pope", "--data", tmp_path / "data", "--output", tmp_path / "out"]
    assert main([*map(str, command), "--max-new-tokens", "4", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"Further benchmarks\n.*\n\n +tiny\n.*\nClocks +0\.0 \[0\.0, 0\.0\]\n  within five minutes +0\.0", said
    )
    assert re.search(r"POPE +data missing", said)
