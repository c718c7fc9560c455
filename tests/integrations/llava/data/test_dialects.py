"""Ways to write a sample that become LLaVA's: messages with roles, parts, lists of images, questions, captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from integrations.llava.data import read_samples, survey_samples
from integrations.llava.data.dialects import as_sample, with_label
from integrations.llava.prompts import get_template
from tests.integrations.llava.tiny_parts import human_and_gpt
from tests.source_support import ROOT

ONE = {"id": 1, "image": "a.png", "conversations": human_and_gpt("<image>\nWhat?", "A.")}
TWO = {"id": 1, "image": ["a.png", "b.png"], "conversations": human_and_gpt("<image>\nand\n<image>\nWhat?", "A.")}


def chat(*contents: Any, **keys: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    turns = [{"role": roles[index % 2], "content": content} for index, content in enumerate(contents)]
    return {"id": 1, "messages": turns, **keys}


def part(kind: str, **keys: Any) -> dict[str, Any]:
    return {"type": kind, **keys}


TEXT, ANSWER = part("text", text="What?"), [part("text", text="A.")]


@pytest.mark.parametrize(
    "row",
    [
        ONE,
        chat("<image>\nWhat?", "A.", images=["a.png"]),
        chat("What?", "A.", images=["a.png"]),
        chat("What?", "A.", image="a.png"),
        chat("What?", "A.", images=[{"path": "a.png", "bytes": None}]),
        chat([part("image"), TEXT], ANSWER, images=["a.png"]),
        chat([part("image", image="a.png"), TEXT], "A."),
        chat([part("image", path="a.png"), "What?"], "A."),
        chat([part("image", image=None, text=None), part("text", text="What?", image=None)], "A.", images=["a.png"]),
        chat([part("image_url", image_url={"url": "a.png"}), TEXT], "A."),
        chat([part("image_url", image_url="a.png"), TEXT], "A."),
        {"id": 1, "images": ["a.png"], "conversations": human_and_gpt("<image>\nWhat?", "A.")},
        {"id": 1, "images": ["a.png"], "image": None, "conversations": human_and_gpt("What?", "A.")},
        {"id": 1, "images": ["a.png"], "conversations": chat("What?", "A.")["messages"]},
        {"id": 1, "image": "a.png", "question": "What?", "answer": "A."},
        {"id": 1, "image": "a.png", "question": "<image>\nWhat?", "answer": "A."},
    ],
)
def test_one_image_is_written_in_many_ways(row: dict[str, Any]) -> None:
    assert as_sample(row) == ONE


@pytest.mark.parametrize(
    "row",
    [
        chat([part("image"), "and", part("image"), TEXT], ANSWER, images=["a.png", "b.png"]),
        chat([part("image"), "and", part("image", image="b.png"), TEXT], ANSWER, images=["a.png"]),
        chat("<image>\nand\n<image>\nWhat?", "A.", images=["a.png", "b.png"]),
    ],
)
def test_several_images_stand_where_they_are_written(row: dict[str, Any]) -> None:
    assert as_sample(row) == TWO


def test_images_without_a_place_stand_in_front() -> None:
    sample = as_sample(chat("What?", "A.", "Sure?", "Yes.", images=["a.png", "b.png"]))
    turns = human_and_gpt("<image>\n<image>\nWhat?", "A.", "Sure?", "Yes.")

    assert sample == {"id": 1, "image": ["a.png", "b.png"], "conversations": turns}
    assert as_sample({"image": "a.png", "caption": "A cat."})["conversations"] == human_and_gpt("<image>", "A cat.")


def test_system_turns_and_other_keys_are_kept() -> None:
    system = {"from": "system", "value": "Be brief."}
    turns = human_and_gpt("What?", "A.")

    for row in (
        {"messages": [{"role": "system", "content": "Be brief."}, *chat("What?", "A.")["messages"]], "note": 5},
        {"system": "Be brief.", "conversations": turns, "note": 5},
    ):
        assert as_sample(row) == {"note": 5, "conversations": [system, *turns]}
    assert as_sample({"system": "", "conversations": turns, "images": []})["conversations"] is turns


@pytest.mark.parametrize("value", [5, None, [1], {"id": 1}, {"messages": "text"}, {"conversations": [5]}])
def test_what_is_in_no_known_form_is_left(value: Any) -> None:
    assert as_sample(value) == value


def test_names_inside_a_file_begin_with_its_label() -> None:
    assert with_label(ONE, "x.tar")["image"] == "x.tar/a.png"
    assert with_label(TWO, "x.tar")["image"] == ["x.tar/a.png", "x.tar/b.png"]
    for value in (5, {"image": ""}, {"image": [None]}, {"conversations": []}):
        assert with_label(value, "x.tar") == value


@pytest.mark.parametrize(
    ("row", "kind", "message"),
    [
        (chat("<image>\nWhat?", "A.", images=["a.png", "a.png"]), "image_tags", "has 2 images but 1 <image> tags"),
        (chat([part("image"), TEXT], "A."), "image_tags", "has 0 images but 1 <image> tags"),
        (chat([part("video", video="a.mp4"), TEXT], "A."), "unread_media", "has 'video', which is not read; images"),
        (chat([part("video_url", video_url="a"), TEXT], "A."), "unread_media", "has 'video_url', which is not read"),
        (
            chat([part("input_audio"), TEXT], "A."),
            "bad_turn",
            "not {'from': 'human' | 'gpt', 'value': text}: {'from': 'human', 'value': [{'type': 'input_audio'",
        ),
        (chat("What?", "A.", images=["a.mp4"]), "unread_media", "has 'a.mp4', which is not read; images alone"),
        (chat("<video>\nWhat?", "A."), "unread_media", "has '<video>', which is not read; images alone are read"),
        (chat("What?", None), "bad_turn", "has a turn that is not {'from': 'human' | 'gpt', 'value': text}"),
        ({"messages": [{"role": "tool", "content": "5"}]}, "bad_turn", "{'role': 'tool', 'content': '5'}"),
        ({"image": None, "question": "What?", "answer": "A."}, "bad_image_entry", "has the image entry ''"),
        ({"image": "a.png", "question": 5, "answer": "A."}, "bad_turn", "'value': 5"),
        (chat("What?", "A.", images=["http://x/a.png"]), "linked_image", "is a URL, no file name"),
        (chat([part("image_url", image_url={"url": "file:///a.png"})], "A."), "outside_folder", "image /a.png"),
        (chat("What?", "A.", images=[{"bytes": "…"}]), "bad_image_entry", "has the image entry"),
    ],
)
def test_the_doctor_says_what_is_wrong_with_a_form(
    tmp_path: Path, row: dict[str, Any], kind: str, message: str
) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    survey = survey_samples(
        read_samples(tmp_path / "a.jsonl"), image_folder=tmp_path, template=get_template("v1"), workers=1
    )
    finding = survey.findings[0]

    assert (finding.kind, finding.place) == (kind, "line 1")
    assert message in finding.message


def test_a_text_about_video_tags_is_no_video(tmp_path: Path) -> None:
    sample = {"conversations": human_and_gpt("How do I use <video> in HTML?\n<video>x</video>", "<video>")}

    assert not survey_samples([sample], image_folder=tmp_path, template=get_template("v1"), workers=1).findings


def test_the_pages_ways_to_write_a_sample_are_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in page.partition("```json\n")[2].partition("```")[0].splitlines()]
    (tmp_path / "coco").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "coco" / "1.jpg")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    samples = read_samples(tmp_path / "a.json")
    survey = survey_samples(samples, image_folder=tmp_path, template=get_template("v1"), warnings=False, workers=1)

    assert len(rows) == 6 and not survey.findings
    assert all(sample["image"] == "coco/1.jpg" for sample in samples)
    asked = {sample["conversations"][-2]["value"] for sample in samples}
    assert asked == {"<image>\nWhat is this?", "<image>"}
