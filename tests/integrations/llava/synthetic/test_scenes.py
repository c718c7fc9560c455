"""Scenes, photographs, pictures and questions of the embedded data set."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from integrations.llava.synthetic import photographs
from integrations.llava.synthetic.photographs import (
    PHOTOGRAPHS,
    SPLITS,
    photograph_path,
    read_crop,
    sample_crop,
    split_region,
)
from integrations.llava.synthetic.questions import KINDS, caption, conversation, format_box, questions_of_kind
from integrations.llava.synthetic.rendering import RGB, draw_scene, glyph_mask, render_array, shape_mask
from integrations.llava.synthetic.scene import (
    CELL,
    CHARACTERS,
    COLORS,
    GRID,
    IMAGE_SIZE,
    SHAPES,
    TEXT_LENGTH,
    Scene,
    sample_scene,
    split_of_string,
)

seeds = st.integers(0, 2**31)
splits = st.sampled_from(SPLITS)
scenes = st.builds(lambda seed, split: sample_scene(np.random.default_rng(seed), split), seeds, splits)


@given(height=st.integers(10, 2000), width=st.integers(10, 2000))
def test_split_regions_share_no_pixel_and_cover_the_photograph(height: int, width: int) -> None:
    owner = np.zeros((height, width), dtype=int)
    for split in SPLITS:
        top, left, bottom, right = split_region(split, height, width)
        owner[top:bottom, left:right] += 1
    assert (owner == 1).all()


def test_every_photograph_ships_with_scikit_image() -> None:
    for name in PHOTOGRAPHS:
        with Image.open(photograph_path(name)) as image:
            assert min(image.size) >= 256


@settings(max_examples=40, deadline=None)
@given(seed=seeds, split=splits)
def test_crop_comes_from_its_splits_region_and_has_the_asked_size(seed: int, split: str) -> None:
    crop = sample_crop(np.random.default_rng(seed), split, IMAGE_SIZE)
    assert crop.split == split
    assert read_crop(crop, IMAGE_SIZE).shape == (IMAGE_SIZE, IMAGE_SIZE, 3)


def test_every_string_belongs_to_one_split_in_the_stated_shares() -> None:
    strings = ["".join(picked) for picked in itertools.permutations(CHARACTERS, TEXT_LENGTH)]
    shares = Counter(split_of_string(string) for string in strings)
    assert set(shares) == set(SPLITS)
    assert shares["train"] / len(strings) == pytest.approx(0.8, abs=0.03)
    assert shares["test"] / len(strings) == pytest.approx(0.1, abs=0.03)


@settings(max_examples=60, deadline=None)
@given(seed=seeds, split=splits)
def test_scene_is_the_same_for_the_same_seed(seed: int, split: str) -> None:
    first, second = (sample_scene(np.random.default_rng(seed), split) for _ in range(2))
    assert first == second
    np.testing.assert_array_equal(render_array(first), render_array(second))


@settings(max_examples=60, deadline=None)
@given(scene=scenes)
def test_scene_shows_a_string_of_its_own_split_with_different_characters(scene: Scene) -> None:
    assert split_of_string(scene.text.string) == scene.crop.split
    assert len(set(scene.text.string)) == TEXT_LENGTH


@settings(max_examples=60, deadline=None)
@given(scene=scenes)
def test_objects_and_text_share_no_cell_and_no_color(scene: Scene) -> None:
    taken = np.zeros((GRID, GRID), dtype=int)
    taken[scene.text.row, scene.text.column : scene.text.column + TEXT_LENGTH] += 1
    for item in scene.objects:
        taken[item.row : item.row + item.cells, item.column : item.column + item.cells] += 1
    assert taken.max() == 1
    assert 2 <= len(scene.objects) <= 5
    assert len({item.color for item in scene.objects}) == len(scene.objects)


@settings(max_examples=60, deadline=None)
@given(scene=scenes)
def test_boxes_lie_inside_the_image_and_inside_their_cells(scene: Scene) -> None:
    for item in scene.objects:
        x1, y1, x2, y2 = (value * IMAGE_SIZE for value in item.box)
        assert 0 <= item.column * CELL <= x1 < x2 <= (item.column + item.cells) * CELL <= IMAGE_SIZE
        assert 0 <= item.row * CELL <= y1 < y2 <= (item.row + item.cells) * CELL <= IMAGE_SIZE


@settings(max_examples=40, deadline=None)
@given(scene=scenes)
def test_boxes_are_tight_around_the_pixels_that_drawing_an_object_changes(scene: Scene) -> None:
    item = scene.objects[-1]
    other = next(color for color in COLORS if color not in {one.color for one in scene.objects})
    changed = dataclasses.replace(scene, objects=(*scene.objects[:-1], dataclasses.replace(item, color=other)))
    rows, columns = np.nonzero((render_array(scene) != render_array(changed)).any(-1))
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert tuple(value / IMAGE_SIZE for value in found) == item.box


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("extent", [6, 7, 13, 14])
def test_every_shape_touches_all_four_sides_of_its_box(shape: str, extent: int) -> None:
    mask = shape_mask(shape, extent)
    assert mask.shape == (extent, extent)
    assert mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any()


def test_no_two_shapes_or_characters_look_the_same() -> None:
    for extent in (6, 7, 13, 14):
        assert len({shape_mask(shape, extent).tobytes() for shape in SHAPES}) == len(SHAPES)
    assert len({glyph_mask(character).tobytes() for character in CHARACTERS}) == len(CHARACTERS)
    assert set(RGB) == set(COLORS)


def test_picture_is_rgb_of_the_stated_size() -> None:
    image = draw_scene(sample_scene(np.random.default_rng(0), "train"))
    assert (image.mode, image.size) == ("RGB", (IMAGE_SIZE, IMAGE_SIZE))


@settings(max_examples=60, deadline=None)
@given(scene=scenes)
def test_answers_follow_from_the_scene(scene: Scene) -> None:
    assert [question.answer for question in questions_of_kind(scene, "ocr")] == [scene.text.string]
    for question in questions_of_kind(scene, "counting"):
        word = question.text.split()[2]
        counted = [item for item in scene.objects if word == "objects" or word in (f"{item.shape}s", f"{item.shape}es")]
        assert question.answer == str(len(counted))
    for question in questions_of_kind(scene, "color"):
        named = [item for item in scene.objects if item.shape == question.text.rstrip("?").split()[-1]]
        assert [item.color for item in named] == [question.answer]
    for question in questions_of_kind(scene, "shape"):
        named = [item for item in scene.objects if item.color == question.text.split()[4]]
        assert [item.shape for item in named] == [question.answer]
    for question in questions_of_kind(scene, "box"):
        color, shape = question.text.rstrip("?").split()[-2:]
        named = [item for item in scene.objects if (item.color, item.shape) == (color, shape)]
        assert [item.box for item in named] == [question.box]
        assert question.box is not None and question.answer == format_box(question.box)


@settings(max_examples=60, deadline=None)
@given(scene=scenes, seed=seeds)
def test_a_conversation_asks_every_kind_and_nothing_twice(scene: Scene, seed: int) -> None:
    questions = conversation(scene, np.random.default_rng(seed))
    possible = {kind for kind in KINDS if questions_of_kind(scene, kind)}
    assert {question.kind for question in questions} == possible
    assert len({question.text for question in questions}) == len(questions) <= 10


@settings(max_examples=30, deadline=None)
@given(scene=scenes)
def test_caption_names_everything_in_the_scene(scene: Scene) -> None:
    line = caption(scene)
    assert line.startswith(scene.photograph) and line.endswith(scene.text.string)
    for item in scene.objects:
        assert f"a {item.size} {item.color} {item.shape}" in line


def test_box_is_written_with_two_decimals() -> None:
    assert format_box((0.0, 0.125, 0.5, 1.0)) == "[0.00, 0.12, 0.50, 1.00]"


def test_unknown_photograph_is_refused() -> None:
    with pytest.raises(ValueError, match="photograph 'dog' is unknown; known: astronaut"):
        photograph_path("dog")


def test_missing_scikit_image_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="scikit-image, which is not installed"):
        photograph_path("cat")


def test_missing_photograph_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(photographs, "find_spec", lambda name: Spec())
    with pytest.raises(FileNotFoundError, match="photograph 'cat' is missing: .*chelsea.png"):
        photograph_path("cat")


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split 'dev' is unknown; known: train, val, test"):
        split_region("dev", 10, 10)


def test_unknown_kind_of_question_is_refused() -> None:
    with pytest.raises(ValueError, match="question kind 'size' is unknown; known: ocr"):
        questions_of_kind(sample_scene(np.random.default_rng(0), "train"), "size")
