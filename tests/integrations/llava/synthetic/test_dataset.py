"""The embedded data set on disk."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from integrations.llava.synthetic import dataset, made_from, make_dataset
from integrations.llava.synthetic.captions import DENSE_CAPTION_PROMPT, dense_caption
from integrations.llava.synthetic.dataset import scene_at
from integrations.llava.synthetic.questions import KINDS
from integrations.llava.synthetic.scene import IMAGE_SIZE

NUM = {"train": 12, "val": 3, "test": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "made", seed=7, num_train=12, num_val=3, num_test=5)


def _digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _rows(folder: Path, split: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_folder_holds_every_image_and_nothing_else(folder: Path) -> None:
    names = {path.name for path in (folder / "images").iterdir()}
    assert names == {f"{split}_{index:06d}.png" for split, count in NUM.items() for index in range(count)}
    others = {path.name for path in folder.iterdir()}
    assert others == {"images", "settings.json", "pretrain.json", "train.json", "val.jsonl", "test.jsonl"}
    for name in names:
        with Image.open(folder / "images" / name) as image:
            assert (image.mode, image.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))


def test_pretrain_has_one_caption_an_image(folder: Path) -> None:
    records = json.loads((folder / "pretrain.json").read_text())
    assert [record["image"] for record in records] == [f"train_{index:06d}.png" for index in range(12)]
    for index, record in enumerate(records):
        human, gpt = record["conversations"]
        assert human == {"from": "human", "value": f"<image>\n{DENSE_CAPTION_PROMPT}"}
        assert gpt == {"from": "gpt", "value": dense_caption(scene_at(7, "train", index))}


def test_train_conversations_alternate_and_show_the_image_once(folder: Path) -> None:
    for record in json.loads((folder / "train.json").read_text()):
        messages = record["conversations"]
        assert [message["from"] for message in messages] == ["human", "gpt"] * (len(messages) // 2)
        assert len(messages) >= 10
        assert messages[0]["value"].startswith("<image>\n")
        assert sum("<image>" in message["value"] for message in messages) == 1


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_asks_at_most_one_question_of_each_kind_an_image(folder: Path, split: str) -> None:
    rows = _rows(folder, split)
    assert [row["question_id"] for row in rows] == list(range(len(rows)))
    asked = [(row["image"], row["kind"]) for row in rows]
    assert len(set(asked)) == len(asked)
    assert {kind for _, kind in asked} == set(KINDS)
    for row in rows:
        assert set(row) == {"question_id", "image", "text", "kind", "answer"}
        if row["kind"] == "box":
            assert isinstance(row["answer"], list) and len(row["answer"]) == 4
        else:
            assert isinstance(row["answer"], str)


def test_answers_belong_to_the_image_they_stand_beside(folder: Path) -> None:
    for row in _rows(folder, "test"):
        if row["kind"] == "ocr":
            assert row["answer"] == scene_at(7, "test", int(str(row["image"])[5:11])).text.string


def test_splits_share_no_string() -> None:
    strings = {split: {scene_at(7, split, index).text.string for index in range(150)} for split in NUM}
    assert not strings["train"] & (strings["val"] | strings["test"])
    assert not strings["val"] & strings["test"]


def test_same_seed_gives_the_same_files_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    again = make_dataset(tmp_path / "again", seed=7, num_train=12, num_val=3, num_test=5)
    other = make_dataset(tmp_path / "other", seed=8, num_train=12, num_val=3, num_test=5)
    assert _digest(again) == _digest(folder)
    assert _digest(other)["train.json"] != _digest(folder)["train.json"]


def test_more_training_images_leave_the_first_ones_as_they_were(folder: Path, tmp_path: Path) -> None:
    larger = make_dataset(tmp_path / "larger", seed=7, num_train=20, num_val=3, num_test=5)
    small, large = _digest(folder), _digest(larger)
    assert {name: large[name] for name in small if name.startswith("images")} == {
        name: digest for name, digest in small.items() if name.startswith("images")
    }


def test_an_existing_data_set_is_kept_and_made_again_only_for_other_settings_or_when_asked(tmp_path: Path) -> None:
    made = make_dataset(tmp_path / "data", num_train=2, num_val=1, num_test=1)
    image = made / "images" / "train_000000.png"
    first = image.stat().st_mtime_ns
    make_dataset(made, num_train=2, num_val=1, num_test=1)
    assert image.stat().st_mtime_ns == first
    make_dataset(made, num_train=2, num_val=1, num_test=1, renew=True)
    second = image.stat().st_mtime_ns
    assert second != first
    make_dataset(made, num_train=1, num_val=1, num_test=1)
    assert {path.name for path in (made / "images").iterdir()} == {
        "train_000000.png",
        "val_000000.png",
        "test_000000.png",
    }


@pytest.mark.parametrize("name", ["thesis.tex", "images/holiday.png", "images/train_000000.jpg"])
def test_what_make_dataset_did_not_write_is_never_replaced(name: str, tmp_path: Path) -> None:
    made = make_dataset(tmp_path / "data", num_train=1, num_val=1, num_test=1)
    (made / name).touch()
    with pytest.raises(FileExistsError, match=f"data holds {name}, which make_dataset did not write"):
        make_dataset(made, num_train=2, num_val=1, num_test=1)
    assert (made / name).exists()


@pytest.mark.parametrize("settings", [None, "{}", '{"seed": 0, "colour": "red"}', "[1]", "{"])
def test_a_settings_file_of_another_program_proves_nothing(settings: str | None, tmp_path: Path) -> None:
    names = ["train.json"]
    if settings is not None:
        (tmp_path / "settings.json").write_text(settings)
        names.insert(0, "settings.json")
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(FileExistsError, match=f"holds {', '.join(names)}, which make_dataset did not write"):
        make_dataset(tmp_path, num_train=1, num_val=1, num_test=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is killed in the middle of a rename")
def test_a_replacement_that_was_killed_is_made_whole_by_the_next_call(tmp_path: Path) -> None:
    """Whichever file was the last to move, no half of two data sets is taken for a whole one."""
    expected = _digest(make_dataset(tmp_path / "fresh", seed=1, num_train=1, num_val=1, num_test=1))
    # Eight files of the old set move out of the way, then eight of the new one into their places.
    for moves in (0, 4, *range(8, 16)):
        made = make_dataset(tmp_path / f"{moves}", num_train=1, num_val=1, num_test=1)
        child = os.fork()
        if child == 0:
            _replace_and_die(made, moves)
        assert os.waitpid(child, 0)[1] != 0
        make_dataset(made, seed=1, num_train=1, num_val=1, num_test=1)
        assert _digest(made) == expected


def _replace_and_die(folder: Path, moves: int) -> None:
    replace, left = os.replace, list(range(moves))

    def move(source: Path, target: Path) -> None:
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left.pop()
        replace(source, target)

    os.replace = move
    try:
        make_dataset(folder, seed=1, num_train=1, num_val=1, num_test=1)
    finally:
        os._exit(0)


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "draw_scene", stop)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(tmp_path / "data", num_train=2, num_val=1, num_test=1)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_val is 0; every split needs at least 1 image"):
        make_dataset(tmp_path / "data", num_train=2, num_val=0, num_test=1)


def test_a_folder_with_other_things_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"holds thesis.tex, which make_dataset did not write, so nothing"):
        make_dataset(tmp_path)
    with pytest.raises(FileExistsError, match=r"thesis.tex is a file; give a folder"):
        make_dataset(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").exists()


def test_what_a_data_set_was_made_from_is_read_unless_other_scenes_are_drawn_now(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "data", seed=5, num_train=2, num_val=1, num_test=1)
    assert made_from(folder) == {"seed": 5, "num_train": 2, "num_val": 1, "num_test": 1}
    noted = folder / "settings.json"
    noted.write_text(noted.read_text().replace('"version": ', '"version": 1'))
    for place in (folder, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds no data set that this version makes"):
            made_from(place)
