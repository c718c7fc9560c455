"""The check of samples and images, and what training does about bad ones."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from integrations.llava.data import (
    Selection,
    check_samples,
    drawn_evenly,
    read_samples,
    select_samples,
    survey_samples,
    usable_indices,
    usable_samples,
)
from integrations.llava.data.doctor import survey as survey_module
from integrations.llava.data.doctor.texts import TokenLimit
from integrations.llava.image_layout import FixedLayout
from integrations.llava.prompts import IGNORE_INDEX, TEMPLATES, TextEncoder, render
from tests.integrations.llava.tiny_parts import human_and_gpt, make_tokenizer

GOOD = {"conversations": human_and_gpt("a", "b")}


def about(image: Any, *turns: str) -> dict[str, Any]:
    return {"image": image, "conversations": human_and_gpt(*(turns or ("<image>\na", "b")))}


def check(samples: list[Any], folder: Path, template: str = "v1", how: str = "decode") -> None:
    check_samples(samples, image_folder=folder, template=TEMPLATES[template], check_images=how)  # type: ignore[arg-type]


def kinds(samples: list[Any], folder: Path, **options: Any) -> list[tuple[int, str]]:
    defaults = {"template": TEMPLATES["v1"], "check_images": "decode", "workers": 1}
    found = survey_samples(samples, image_folder=folder, **(defaults | options))
    return [(finding.index, finding.kind) for finding in found.findings if finding.kind != "duplicate_id"]


# Texts


def test_good_data_pass_every_check(data_folder: Path) -> None:
    check(list(read_samples(data_folder / "train.json")), data_folder)
    check(list(read_samples(data_folder / "pretrain.json")), data_folder, "plain")


@pytest.mark.parametrize(
    ("sample", "kind", "problem"),
    [
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "turn_order", "they have to alternate"),
        ({"conversations": human_and_gpt("only a question")}, "turn_order", "they have to alternate"),
        ({"conversations": human_and_gpt("a", "b")[1:]}, "turn_order", "turns are missing"),
        ({"conversations": []}, "no_conversation", "has no 'conversations'"),
        ({}, "no_conversation", "has no 'conversations'"),
        ("text", "not_an_object", "is a str, so it has no 'conversations'"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "bad_turn", "a turn that is not"),
        ({"conversations": [{"from": "system", "value": "a"}]}, "turn_order", "turns are system; they have"),
        ({"conversations": [{"from": "human", "value": 7}]}, "bad_turn", "a turn that is not"),
        ({"conversations": ["hello"]}, "bad_turn", "a turn that is not"),
        ({"conversations": human_and_gpt("<image>\na", "b")}, "image_tags", "has 0 images but 1 <image> tags"),
        (about("0.png", "a", "b"), "image_tags", "has 1 images but 0 <image> tags"),
        (about("0.png", "<image>", "b", "<image>", "c"), "image_tags", "1 images but 2"),
        (about(["0.png", "1.png"], "<image>", "b"), "image_tags", "2 images but 1"),
        (about(7), "bad_image_entry", "has the image entry '7'"),
        (about(["0.png", None]), "bad_image_entry", "has the image entry"),
        (about(""), "bad_image_entry", "give a file name, several, or none"),
        (about("../a.png"), "outside_folder", "image ../a.png: outside the image folder"),
        (about("a/../../b.png"), "outside_folder", "outside the image folder"),
        (about("/etc/a.png"), "outside_folder", "outside the image folder"),
        (about("nowhere.png"), "missing_image", "nowhere.png: missing"),
    ],
)
def test_a_faulty_sample_is_listed_before_training(data_folder: Path, sample: Any, kind: str, problem: str) -> None:
    with pytest.raises(ValueError, match="1 problems in the data") as error:
        check([GOOD, sample], data_folder)
    assert problem in str(error.value)
    assert "sample 1: " in str(error.value)
    assert kinds([GOOD, sample], data_folder) == [(1, kind)]


def test_names_may_be_absolute_inside_the_folder(data_folder: Path) -> None:
    samples = [about(str(data_folder / "0.png")), about("a/../0.png")]

    assert kinds(samples[:1], data_folder) == kinds(samples[:1], Path("/")) == []
    (data_folder / "a").mkdir(exist_ok=True)
    assert kinds(samples[1:], data_folder) == []


def test_plain_wants_one_caption_for_an_image(data_folder: Path) -> None:
    with pytest.raises(ValueError, match="takes one question and one answer about an image"):
        check([GOOD], data_folder, "plain")
    assert kinds([about("0.png", "<image>", "b", "c", "d")], data_folder, template=TEMPLATES["plain"]) == [
        (0, "caption_form")
    ]


def test_a_system_turn_is_a_fault_only_where_the_template_knows_none(data_folder: Path) -> None:
    sample = {"conversations": [{"from": "system", "value": "Be brief."}, *human_and_gpt("a", "b")]}
    found = {name: kinds([sample], data_folder, template=TEMPLATES[name]) for name in ("v1", "chatml", "gemma")}

    assert found == {"v1": [], "chatml": [], "gemma": [(0, "system_turn")]}


@pytest.mark.parametrize(
    ("kept", "kind"),
    [("all", None), ("all but one", "too_long"), ("no answer", "nothing_supervised"), ("no image", "images_too_long")],
)
def test_lengths_are_counted_in_tokens(data_folder: Path, kept: str, kind: str | None) -> None:
    sample = about("0.png", "<image>\nWhat number is it?", "It is number one on a wall.")
    encoder, template = TextEncoder(make_tokenizer("llama")), TEMPLATES["v1"]
    labels = render(sample["conversations"], template=template, encoder=encoder, image_token_id=-1, num_images=1).labels
    question = labels.count(IGNORE_INDEX) + 49
    max_length = {"all": len(labels) + 49, "all but one": len(labels) + 48, "no answer": question, "no image": 49}[kept]
    tokens = TokenLimit(encoder, layout=FixedLayout(-1, 50), max_length=max_length)
    found = survey_samples([sample], image_folder=data_folder, template=template, tokens=tokens).findings

    assert [finding.kind for finding in found] == ([kind] if kind else [])
    assert all(f"{len(labels) + 49} tokens, max_length is {max_length}" in finding.message for finding in found)


@pytest.mark.parametrize(
    ("turns", "kind", "message"),
    [
        (("What is <s>?", "A tag, </s>."), "control_token", "has </s>, <s> in its text"),
        (("What marks an image?", "<image>"), "control_token", "has <image> in its text"),
        (("a", " \n"), "empty_answer", "has an answer without text"),
    ],
)
def test_harmless_oddities_are_warnings(data_folder: Path, turns: Any, kind: str, message: str) -> None:
    sample = {"id": 1, "conversations": human_and_gpt(*turns)}
    found = survey_samples([sample], image_folder=data_folder, template=TEMPLATES["v1"])

    assert [(finding.kind, finding.message) for finding in found.warnings] == [(kind, message)]
    assert found.problems == []
    check([sample], data_folder)


def test_an_id_used_twice_is_a_warning(data_folder: Path) -> None:
    samples = [{"id": 7} | GOOD, {"id": 3} | GOOD, {"id": "7"} | GOOD, GOOD]
    found = survey_samples(samples, image_folder=data_folder, template=TEMPLATES["v1"])

    assert [(finding.index, finding.message) for finding in found.findings] == [(2, "has the id of entry 1")]


# Images


def test_all_bad_images_are_listed(tmp_path: Path) -> None:
    Image.effect_noise((99, 99), 50).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-2000])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    names = ["good.png", "cut.png", "empty.png", "text.png", "missing.png"]

    with pytest.raises(ValueError, match="4 problems in the data") as error:
        check([about(name) for name in names], tmp_path)
    for name, fault in [("cut", "corrupt"), ("empty", "corrupt"), ("text", "corrupt"), ("missing", "missing")]:
        assert f"image {name}.png: {fault}" in str(error.value)


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "webp", "bmp", "tif"])
def test_a_file_cut_off_is_told_from_one_that_is_no_image(tmp_path: Path, ending: str) -> None:
    Image.effect_noise((99, 99), 50).convert("RGB").save(tmp_path / f"whole.{ending}")
    content = (tmp_path / f"whole.{ending}").read_bytes()
    (tmp_path / f"cut.{ending}").write_bytes(content[: len(content) * 2 // 3])
    (tmp_path / f"text.{ending}").write_text("<html>404 Not Found</html>")

    samples = [about(f"{name}.{ending}") for name in ("whole", "cut", "text")]
    assert kinds(samples, tmp_path) == [(1, "truncated_image"), (2, "broken_image")]


def test_reading_sizes_only_does_not_decode(tmp_path: Path) -> None:
    Image.effect_noise((99, 99), 50).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-2000])

    check([about("a.png")], tmp_path, how="size")
    check([about("nowhere.png")], tmp_path, how="none")
    with pytest.raises(ValueError, match="corrupt, cut off"):
        check([about("a.png")], tmp_path, how="decode")


@pytest.mark.parametrize("there", ["a.gif", "a.PNG"])
def test_an_image_under_another_ending_is_named(tmp_path: Path, there: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / there)
    found = survey_samples([about("a.jpg")], image_folder=tmp_path, template=TEMPLATES["v1"]).findings

    assert [(finding.kind, finding.repair) for finding in found] == [("wrong_extension", there)]
    assert found[0].message.endswith(f"a.jpg: missing, but {there} is there")


def test_a_broken_image_under_another_ending_does_not_help(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_text("no image")

    assert kinds([about("a.jpg")], tmp_path) == [(0, "missing_image")]


def test_content_of_another_format_is_a_warning(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", format="GIF")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpeg")
    Image.new("RGB", (8, 8)).save(tmp_path / "c", format="PNG")

    assert kinds([about("a.jpg"), about("b.jpeg"), about("c")], tmp_path) == [(0, "mislabeled_image")]
    check([about("a.jpg")], tmp_path)


def test_the_pixel_limit_is_the_callers_or_pillows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")

    assert kinds([about("a.png")], tmp_path, max_pixels=600) == []
    assert kinds([about("a.png")], tmp_path, max_pixels=599) == [(0, "large_image")]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 299)
    assert kinds([about("a.png")], tmp_path) == [(0, "large_image")]


def test_names_that_no_file_can_have_are_problems(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    samples = [about("a\0b.png"), about("x" * 999), about("folder.png"), about("folder.png/a.png")]

    assert kinds(samples, tmp_path) == [
        (0, "broken_image"),
        (1, "broken_image"),
        (2, "missing_image"),
        (3, "missing_image"),
    ]


def test_an_image_is_looked_at_once_and_every_sample_with_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    whole = survey_module.image_faults
    monkeypatch.setattr(
        survey_module, "image_faults", lambda folder, name, **how: looked.append(name) or whole(folder, name, **how)
    )

    samples = [about("a.png"), GOOD, about(["a.png", "a.png"], "<image><image>", "b")]
    assert kinds(samples, tmp_path) == [(0, "missing_image"), (2, "missing_image")]
    assert looked == ["a.png"]


# The whole data set


def test_samples_and_images_are_counted_by_source(tmp_path: Path) -> None:
    names = ["coco/train2017/1.jpg", "coco/train2017/1.jpg", "coco/2.jpg", "vg/VG_100K/3.jpg", "4.jpg"]
    samples = [*map(about, names), GOOD, {"image": []} | GOOD, 5]
    found = survey_samples(samples, image_folder=tmp_path, template=TEMPLATES["v1"], check_images="none")

    assert {name: (source.num_samples, source.num_images) for name, source in found.sources.items()} == {
        "coco": (3, 2),
        "text only": (2, 0),
        "vg": (1, 1),
        "(no folder)": (1, 1),
        "(unclear)": (1, 0),
    }


def test_several_processes_find_what_one_finds(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey_module, "_TEXTS_PER_TASK", 3)
    monkeypatch.setattr(survey_module, "_IMAGES_PER_TASK", 2)
    samples = [*read_samples(data_folder / "train.json"), about("nowhere.png"), 5]
    alone, together = (
        survey_samples(samples, image_folder=data_folder, template=TEMPLATES["v1"], workers=workers)
        for workers in (1, 2)
    )

    assert alone == together
    assert [finding.kind for finding in together.problems] == ["missing_image", "not_an_object"]


def test_a_check_leaves_the_random_state_alone(data_folder: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check(list(read_samples(data_folder / "train.json")), data_folder)

    assert torch.equal(torch.get_rng_state(), before)


def test_a_long_list_of_problems_is_shortened(data_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"25 problems in the data \(25 no conversation\)") as error:
        check([{}] * 25, data_folder)
    assert "… and 5 more" in str(error.value)
    assert "leave them out (--bad-samples skip; in a recipe data.bad_samples: skip)" in str(error.value)


# What training does


def test_bad_samples_can_be_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"conversations": [\n' + '{"conversations": []}\n' * 2)
    samples = [{}, GOOD, about("nowhere.png"), GOOD | {"id": "last"}]
    options: Any = {"image_folder": tmp_path, "template": TEMPLATES["v1"], "bad_samples": "skip"}
    with caplog.at_level(logging.WARNING):
        left, problems = usable_samples(samples, **options)

    assert isinstance(left, Selection)
    assert list(left) == [GOOD, GOOD | {"id": "last"}]
    assert [problem.kind for problem in problems] == ["no_conversation", "missing_image"]
    assert "2 of 4 samples are left out: 1 no conversation, 1 image missing; first: sample 0: has no" in caplog.text
    assert usable_samples([GOOD], **options) == ([GOOD], [])
    with pytest.raises(ValueError, match="3 problems in the data"):
        usable_samples(read_samples(tmp_path / "a.jsonl"), **options)


def test_texts_and_images_are_told_in_one_round(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 problems in the data \(1 no conversation, 1 image missing\)"):
        check([{}, about("nowhere.png")], tmp_path)


def test_an_image_folder_that_is_not_there_is_said_as_that_beside_what_the_texts_lack(tmp_path: Path) -> None:
    lacking = f"the image folder {tmp_path / 'imgs'} does not exist, so no image was looked at; give an existing"
    with pytest.raises(ValueError, match=lacking) as error:
        check([GOOD, about("1.png"), about("2.png")], tmp_path / "imgs")
    assert "1.png" not in str(error.value)
    with pytest.raises(ValueError, match=rf"{lacking}.* And: 1 problems in the data \(1 no conversation\)"):
        check([{}, about("1.png")], tmp_path / "imgs")
    check([GOOD], tmp_path / "imgs")  # nothing is looked for there


def test_images_that_are_missing_where_no_folder_was_given_are_told_with_the_option() -> None:
    with pytest.raises(ValueError, match=r"images in the working folder, since no image folder was given .--image-f"):
        check([about("nowhere.png")], "")  # type: ignore[arg-type]


def test_faults_of_drawn_samples_are_told_by_their_place_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in [GOOD, {}, GOOD, {}]))
    samples = read_samples(tmp_path / "a.jsonl")
    drawn = drawn_evenly(len(samples), 2)
    assert drawn.tolist() == [0, 2]
    found = survey_samples(select_samples(samples, [1, 2]), image_folder=tmp_path, template=TEMPLATES["v1"], workers=1)
    assert [(finding.place, finding.sample_id) for finding in found.findings] == [("line 2", "1")]


@pytest.mark.parametrize(
    ("count", "most", "drawn"), [(12, 3, [0, 4, 8]), (5, 3, [0, 1, 3]), (2, 5, [0, 1]), (3, None, [0, 1, 2])]
)
def test_samples_are_drawn_at_equal_distances(count: int, most: int | None, drawn: list[int]) -> None:
    assert drawn_evenly(count, most).tolist() == drawn


def test_indices_are_all_that_other_processes_need(tmp_path: Path) -> None:
    indices, _ = usable_indices(
        [{}, GOOD, GOOD, {}, GOOD], image_folder=tmp_path, template=TEMPLATES["v1"], bad_samples="skip"
    )

    np.testing.assert_array_equal(indices, [1, 2, 4])
    assert indices.dtype == np.int64
