from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from integrations.llava.cli.demo import main
from integrations.llava.config.schema import Recipe
from integrations.llava.study.demo import run_demo
from integrations.llava.study.grid import DemoSettings
from integrations.llava.training.signals import RunInterrupted
from integrations.llava.training.train import train
from layerfuse.errors import ExistingFileError

KINDS = ("ocr", "counting", "color", "shape", "box")


@pytest.fixture(scope="module")
def arguments(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    output = tmp_path_factory.mktemp("demo") / "run"
    given = {"recipe": tiny_recipe, "output": output, "num-train": 4, "num-test": 3, "num-examples": 2}
    return [word for flag, value in {**given, "num-probe-images": 40}.items() for word in (f"--{flag}", str(value))]


@pytest.fixture(scope="module")
def output(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    photo = tmp_path_factory.mktemp("photo") / "photo.jpg"
    Image.effect_noise((90, 60), 80).convert("RGB").save(photo)
    assert main([*arguments, "--image", str(photo), "--prompt", "What is <this>?"]) == 0
    return Path(arguments[arguments.index("--output") + 1])


def test_report_has_both_fusers_all_kinds_and_every_part(output: Path) -> None:
    report = (output / "report.html").read_text()
    for name in ("select", "mmfuser", "reading text", "counting", "colour", "shape", "locating (box)", "photo.jpg"):
        assert name in report
    for part in ("results", "examples", "photo", "probe", "maps", "losses", "cost", "origin"):
        assert f'<section id="{part}">' in report
    assert "What is &lt;this&gt;?" in report
    assert "<dt>runs of each fuser</dt><dd>one seed: 0</dd>" in report
    assert "32×32 cells" in report
    for heading in (
        "Which characters and shapes can still be read",
        "What layers and fusers see",
        "Where mmfuser looks",
    ):
        assert f"<h3>{heading}</h3>" in report
    assert "What depth_attention takes" not in report  # no such run


def test_report_needs_nothing_beside_it(output: Path) -> None:
    report = (output / "report.html").read_text()
    assert "http://" not in report
    assert "https://" not in report
    assert 'src="data:image/png;base64,' in report
    assert 'src="images' not in report


def test_rows_have_command_commit_hardware_and_numbers(output: Path) -> None:
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [(row["fuser"], row["kind"]) for row in rows] == [(f, k) for f in ("select", "mmfuser") for k in KINDS]
    for row in rows:
        assert {"command", "commit", "hardware", "seed", "accuracy", "chance", "num_questions"} <= row.keys()
        assert row["command"].startswith("python -m integrations.llava demo --recipe")
    assert rows[0]["layers"] == [3]
    assert rows[-1]["layers"] == [1, 2, 3]


def test_run_folder_reloads_with_transformers_and_answers_the_same(output: Path) -> None:
    from transformers import AutoModelForImageTextToText

    import integrations.llava  # noqa: F401  (registers the model)
    from integrations.llava.checkpoints.model_io import load_processor
    from integrations.llava.inference.predictor import Predictor

    folder = output / "runs" / "mmfuser-seed0"
    rows = [json.loads(line) for line in (folder / "evaluation" / "predictions.jsonl").read_text().splitlines()]
    predictor = Predictor(AutoModelForImageTextToText.from_pretrained(folder), load_processor(folder))
    images = [Image.open(output / "data" / "images" / row["image"]).convert("RGB") for row in rows]
    with torch.inference_mode():
        answers = predictor(images, [row["text"] for row in rows], max_new_tokens=32)
    assert answers == [row["prediction"] for row in rows]


def test_second_run_trains_and_answers_nothing_anew(
    output: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*") if path.is_file()}
    from integrations.llava.study import runs

    monkeypatch.setattr(runs, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(runs, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*") if path.is_file()} == before


def test_a_report_is_drawn_anew_from_a_finished_study_whatever_code_trained_it(
    output: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from integrations.llava.study import runs

    report, rows = output / "report.html", output / "results.jsonl"
    before = rows.read_bytes()
    origin = json.loads(before.splitlines()[0])
    rows.write_bytes(before.replace(origin["commit"].encode(), b"an-older-commit"))
    shown = report.read_text().partition('<section id="maps">')[2].partition("</section>")[0]
    report.unlink()
    monkeypatch.setattr(runs, "code_digest", lambda part: "of other code")
    monkeypatch.setattr(runs, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(runs, "evaluate", lambda *_, **__: pytest.fail("evaluated again"))
    # Whoever gives other flags gets the scenes and the numbers of images that were made all the same.
    assert main([*arguments, "--num-train", "2000", "--num-test", "9", "--data-seed", "7", "--redraw"]) == 0
    page = report.read_text()
    assert "<dt>training images</dt><dd>4</dd>" in page and "<dt>test images</dt><dd>3 (" in page
    assert page.partition('<section id="maps">')[2].partition("</section>")[0] == shown
    assert "<dd>an-older-commit</dd>" in page
    assert re.search(rf"<dt>drawn anew</dt><dd>commit {re.escape(origin['commit'])}, \d{{4}}-", page)
    assert b"drawn anew" not in rows.read_bytes()
    rows.write_bytes(before)


def test_what_is_not_finished_cannot_be_drawn_anew(
    output: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given, message in (
        (["--output", str(tmp_path / "new")], "so no finished study to draw anew"),
        (["--fusers", "average"], "average-seed0 holds no finished run of a demo"),
    ):
        with pytest.raises(SystemExit):
            main([*arguments, *given, "--redraw"])
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("folder", [(), ("features",)], ids=["its own folder", "a named one"])
def test_runs_with_and_without_feature_cache_are_the_same_runs(
    folder: tuple[str, ...], output: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from integrations.llava.cli import demo

    seen: list[DemoSettings] = []
    monkeypatch.setattr("integrations.llava.study.runs.train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(demo, "run_demo", lambda given, **options: seen.append(given) or run_demo(given, **options))
    named = [str(output.parent / name) for name in folder]
    assert main([*arguments, "--fusers", "mmfuser", "--feature-cache", *named]) == 0
    assert seen[0].feature_cache == (Path(named[0]) if named else output / "features")


def test_rounded_maps_make_another_run(tiny_recipe: Path, output: Path, tmp_path: Path) -> None:
    from integrations.llava.study.grid import run_recipe
    from integrations.llava.study.runs import _fingerprint

    settings = DemoSettings(recipe=str(tiny_recipe), feature_cache=tmp_path / "features")
    cached = run_recipe(settings, "mmfuser", 0, output / "data")
    plain, rounded = (
        replace(cached, finetune=replace(cached.finetune, **changes))
        for changes in ({"feature_cache": ""}, {"feature_cache_dtype": "bf16"})
    )
    first, second, third = (_fingerprint(recipe, output / "data") for recipe in (cached, plain, rounded))
    assert first == second != third


def test_fusers_that_share_a_feature_cache_have_the_losses_and_answers_of_those_without(
    tiny_recipe: Path, output: Path, tmp_path: Path
) -> None:
    from integrations.llava.study.grid import run_recipe
    from integrations.llava.study.runs import finish_run

    data, cache = output / "data", tmp_path / "features"
    own, plain = (DemoSettings(recipe=str(tiny_recipe), feature_cache=folder) for folder in (cache, None))
    for fuser in ("select", "mmfuser"):
        cached = finish_run(run_recipe(own, fuser, 0, data), tmp_path / fuser, data)
    expected = finish_run(run_recipe(plain, "mmfuser", 0, data), output / "runs" / "mmfuser-seed0", data)
    assert cached.losses.keys() == expected.losses.keys() == {"pretrain", "finetune"}
    for stage, losses in expected.losses.items():
        torch.testing.assert_close(cached.losses[stage], losses, atol=1e-5, rtol=0)
    assert cached.answers == expected.answers
    # One map a layer: select's is one of mmfuser's.
    assert sorted(json.loads(file.read_text())["layer"] for file in cache.rglob("map.json")) == [1, 2, 3]


def test_other_steps_are_trained_anew(output: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = output / "runs" / "select-seed0"
    assert main([*arguments, "--fusers", "select", "--finetune-steps", "1"]) == 0
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 1]
    printed = capsys.readouterr().out
    assert all(kind in printed for kind in KINDS)
    assert f"report: {output / 'report.html'}" in printed


def test_data_is_drawn_anew_when_the_code_that_draws_it_has_changed(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from integrations.llava.study import demo

    settings = DemoSettings(output=output.parent / "fresh", num_train=1, num_test=1)
    settings.output.mkdir()
    image = demo._make_data(settings) / "images" / "train_000000.png"
    made = image.stat().st_mtime_ns
    demo._make_data(settings)
    assert image.stat().st_mtime_ns == made
    monkeypatch.setattr(demo, "code_digest", lambda part: "changed")
    demo._make_data(settings)
    assert image.stat().st_mtime_ns != made


def projects_folder(folder: Path, *names: str) -> Path:
    """Somebody's own project, which happens to have files of these names."""
    for name in (*names, "data/settings.json", "data/thesis.tex"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"theirs": {}}')
    return folder


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "data holds thesis.tex, which make_dataset did not write"),
        (("report.html",), "holds report.html, which the demo cannot be shown to have written"),
        (("results.jsonl",), "holds results.jsonl, which the demo cannot be shown to have written"),
        (("demo.json",), "demo.json was not written by the demo"),
    ],
)
def test_a_folder_of_another_project_is_left_as_it_is(
    names: tuple[str, ...], message: str, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = projects_folder(tmp_path / "project", *names)
    before = {path: path.read_text() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit, match="2"):
        main(["--recipe", str(tiny_recipe), "--output", str(folder), "--num-train", "1", "--num-test", "1"])
    assert message in " ".join(capsys.readouterr().err.split())
    assert {path: path.read_text() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_that_the_demo_did_not_train_is_not_replaced(tiny_recipe: Path, tmp_path: Path) -> None:
    from integrations.llava.study.grid import run_recipe
    from integrations.llava.study.runs import finish_run
    from integrations.llava.synthetic import make_dataset

    data = make_dataset(tmp_path / "data", num_train=1, num_val=1, num_test=1)
    own = tmp_path / "runs" / "mmfuser-seed0"
    own.mkdir(parents=True)
    (own / "model.safetensors").touch()
    recipe = run_recipe(DemoSettings(recipe=str(tiny_recipe)), "mmfuser", 0, data)
    with pytest.raises(ExistingFileError, match="mmfuser-seed0 holds model.safetensors, which the demo cannot be sh"):
        finish_run(recipe, own, data)
    assert [path.name for path in own.iterdir()] == ["model.safetensors"]


def test_training_that_was_killed_goes_on_in_the_next_demo(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from integrations.llava.study import runs
    from integrations.llava.study.grid import run_recipe
    from integrations.llava.synthetic import make_dataset

    data = make_dataset(tmp_path / "data", num_train=2, num_val=1, num_test=1)
    folder = tmp_path / "runs" / "select-seed0"
    recipe = run_recipe(DemoSettings(recipe=str(tiny_recipe)), "select", 0, data)

    def stop(recipe: Recipe, folder: Path, **options: Any) -> None:
        train(recipe, folder, stages=["pretrain"], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        runs.finish_run(recipe, folder, data)
    pretrained = (folder / "pretrain" / "adapter.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(runs, "train", train)
    with caplog.at_level("INFO"):
        run = runs.finish_run(recipe, folder, data)
    assert "select-seed0: training was broken off: going on" in caplog.text
    assert (folder / "pretrain" / "adapter.safetensors").stat().st_mtime_ns == pretrained
    assert [len(run.losses[stage]) for stage in ("pretrain", "finetune")] == [2, 2]
    assert set(run.seconds) == {"evaluation"}


@pytest.mark.parametrize(
    ("stopped", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "goes on from the last finished part"),
        (
            RunInterrupted("stage pretrain stopped at step 3 of 9; start the same command again", 75),
            75,
            "at step 3 of 9",
        ),
    ],
)
def test_stopping_says_how_to_go_on(
    stopped: BaseException,
    code: int,
    said: str,
    tmp_path: Path,
    tiny_recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise stopped

    monkeypatch.setattr("integrations.llava.cli.demo.run_demo", stop)
    assert main(["--recipe", str(tiny_recipe), "--output", str(tmp_path)]) == code
    assert said in capsys.readouterr().err


def bad(tmp_path: Path, **changes: object) -> str:
    """What the command says about settings that cannot work."""
    from integrations.llava.study.grid import check_settings

    with pytest.raises((ValueError, OSError)) as error:
        check_settings(replace(DemoSettings(output=tmp_path / "run"), **changes))  # type: ignore[arg-type]
    return str(error.value)


def test_unknown_fuser_is_refused_with_the_nearest(tmp_path: Path) -> None:
    assert "fuser 'mmfusr' is unknown; did you mean 'mmfuser'?" in bad(tmp_path, fusers=("mmfusr",))


def test_unknown_recipe_is_refused(tmp_path: Path) -> None:
    assert "recipe 'tinny' is unknown" in bad(tmp_path, recipe="tinny")


def test_a_recipe_of_several_backbones_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("base: tiny\nmodel:\n  backbone: [a, b]\n  layers: [[1, 2], [3]]\n")
    assert "two.yaml names 2 backbones, and a demo probes the layers of one" in bad(
        tmp_path, recipe=str(tmp_path / "two.yaml")
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusers": ()}, "a demo needs a fuser and a seed"),
        ({"fusers": ("select", "select")}, "fuser select is given more than once; name each fuser once."),
        ({"seeds": (1, 1)}, "seed 1 is given more than once"),
        ({"seeds": (-1,)}, "seed -1 is negative; seeds are 0 or above."),
        ({"num_train": 0}, "num_train is 0; it has to be at least 1."),
    ],
)
def test_impossible_numbers_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    assert message in bad(tmp_path, **changes)


def test_image_without_prompt_is_refused(tmp_path: Path, tiny_recipe: Path) -> None:
    changes = {"recipe": str(tiny_recipe), "image": tmp_path / "photo.jpg"}
    assert "came without a prompt; also ask something" in bad(tmp_path, **changes)
    assert "came without a prompt" in bad(tmp_path, **changes, prompt="  ")


def test_prompt_without_image_is_refused(tmp_path: Path, tiny_recipe: Path) -> None:
    assert "a prompt came without an image" in bad(tmp_path, recipe=str(tiny_recipe), prompt="How many?")


def test_missing_or_unreadable_image_is_refused(tmp_path: Path, tiny_recipe: Path) -> None:
    changes = {"recipe": str(tiny_recipe), "image": tmp_path / "photo.jpg", "prompt": "How many?"}
    assert "photo.jpg does not exist" in bad(tmp_path, **changes)
    (tmp_path / "photo.jpg").write_text("no picture")
    assert "photo.jpg cannot be read" in bad(tmp_path, **changes)


def test_output_that_is_a_file_is_refused(tmp_path: Path, tiny_recipe: Path) -> None:
    (tmp_path / "file").write_text("")
    changes = {"recipe": str(tiny_recipe)}
    assert "is a file, or lies inside one" in bad(tmp_path, **changes, output=tmp_path / "file")
    assert "is a file, or lies inside one" in bad(tmp_path, **changes, output=tmp_path / "file" / "run")
    assert "feature-cache" in bad(tmp_path, **changes, feature_cache=tmp_path / "file")


def test_a_feature_cache_is_refused_before_data_are_made_where_the_backbone_learns(
    tmp_path: Path, tiny_recipe: Path
) -> None:
    recipe = tmp_path / "learns.yaml"
    recipe.write_text(f"base: {tiny_recipe}\nfinetune:\n  trainable: [backbone, fuser, projector]\n")
    changes = {"recipe": str(recipe), "feature_cache": tmp_path / "features"}
    assert "feature_cache keeps the maps of a frozen backbone" in bad(tmp_path, **changes)


def test_output_that_cannot_be_written_is_refused(
    tmp_path: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Tests may run as root, who may write anywhere.
    monkeypatch.setattr("integrations.llava.study.grid.tempfile.TemporaryFile", refuse)
    assert "cannot be written to (Permission denied)" in bad(tmp_path, recipe=str(tiny_recipe))


def test_command_line_words_mistakes_without_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--fusers", "mmfusr", "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "did you mean 'mmfuser'" in capsys.readouterr().err
