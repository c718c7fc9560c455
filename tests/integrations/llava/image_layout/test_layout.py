"""Counting and placing the tokens of images, and what a saved config says about them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from PIL import Image
from transformers import AutoProcessor, LlavaProcessor

from integrations.llava.checkpoints.model_io import load_config, load_model
from integrations.llava.image_layout import FixedLayout, ImageLayout, ImageSize, layout_from_config
from integrations.llava.inference.prompt_builder import load_preparer
from integrations.llava.modeling.model import FusedLlavaConfig

IMAGE = 9


@dataclass(frozen=True)
class RowLayout(ImageLayout):
    """One token a row of eight pixels; four for an image whose size is not known."""

    name: ClassVar[str] = "rows of a test"
    row: int = 8

    def num_tokens(self, image_size: ImageSize | None = None) -> int:
        return 4 if image_size is None else image_size[0] // self.row


LAYOUT = RowLayout(IMAGE)


def test_each_image_token_is_replaced_by_those_of_its_image() -> None:
    ids = [1, IMAGE, 2, IMAGE, IMAGE, 3]

    assert LAYOUT.repeats(ids, [(16, 99), (8, 1), None]) == [1, 2, 1, 1, 4, 1]
    assert LAYOUT.expand(ids, [(16, 99), (8, 1), None]) == [1, IMAGE, IMAGE, 2, *[IMAGE] * 5, 3]
    assert FixedLayout(IMAGE, 3).expand([IMAGE, 1], [(5, 5)]) == [IMAGE, IMAGE, IMAGE, 1]
    assert LAYOUT.expand([1, 2], []) == [1, 2]


@pytest.mark.parametrize(("sizes", "found"), [([], 0), ([(8, 8)] * 2, 2), ([None] * 4, 4)])
def test_image_tokens_and_sizes_have_to_be_as_many(sizes: list[ImageSize | None], found: int) -> None:
    message = f"the text has 1 image tokens, and there are {found} images; give one size per image"
    with pytest.raises(ValueError, match=message):
        LAYOUT.expand([1, IMAGE], sizes)


def test_a_config_gives_the_same_layout_for_any_image_token() -> None:
    layout = RowLayout(IMAGE, row=4)

    assert layout.config == {"name": "rows of a test", "row": 4}
    assert layout_from_config(json.loads(json.dumps(layout.config)), image_token_id=IMAGE) == layout
    assert layout_from_config(layout.config, image_token_id=7) == RowLayout(7, row=4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "fixd", "tokens_per_image": 1}, "image layout 'fixd' is unknown; did you mean 'fixed'"),
        ({"tokens_per_image": 1}, "image layout '' is unknown"),
        ({"name": "fixed"}, "image layout 'fixed' cannot be built from .*tokens_per_image"),
        ({"name": "fixed", "tokens_per_image": 1, "tiles": 2}, "cannot be built from .*tiles"),
        ({"name": "fixed", "tokens_per_image": 0}, "tokens_per_image=0 is no number of tokens; give 1 or more"),
        ({"name": "fixed", "tokens_per_image": "576"}, "tokens_per_image='576' is no number of tokens"),
    ],
)
def test_a_config_that_describes_no_layout_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_from_config(config, image_token_id=IMAGE)


# Saved


def edited(run: Path, folder: Path, file: str, change: Any) -> Path:
    shutil.copytree(run, folder)
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    return folder


def test_model_and_processor_are_saved_with_their_layout(run: Path) -> None:
    described = {"name": "fixed", "tokens_per_image": 16}

    assert load_config(run).image_layout == described
    assert AutoProcessor.from_pretrained(run).image_processor.image_layout == described
    assert load_preparer(run).layout == FixedLayout(load_config(run).image_token_index, 16)


def test_folders_that_0_1_wrote_load_with_their_constant(run: Path, tmp_path: Path) -> None:
    folder = edited(run, tmp_path / "old", "config.json", lambda config: config.pop("image_layout"))
    processor = folder / "processor_config.json"
    content = json.loads(processor.read_text())
    del content["image_processor"]["image_layout"]
    constant = {"patch_size": 32, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 15}
    processor.write_text(json.dumps(content | constant | {"processor_class": "LlavaProcessor"}))
    image, texts = Image.new("RGB", (20, 50)), "<image>\nWhat?"
    inputs = [AutoProcessor.from_pretrained(own)(images=image, text=texts)["input_ids"] for own in (folder, run)]

    assert type(AutoProcessor.from_pretrained(folder)) is LlavaProcessor
    assert inputs[0] == inputs[1]
    assert load_preparer(folder).layout == load_preparer(run).layout
    assert load_preparer(folder).fingerprint == load_preparer(run).fingerprint
    assert load_model(folder).config.layout.num_tokens() == 16


def test_model_and_processor_that_disagree_are_refused(run: Path, tmp_path: Path) -> None:
    def change(content: Any) -> None:
        content["image_processor"]["image_layout"]["tokens_per_image"] = 15

    folder = edited(run, tmp_path / "mixed", "processor_config.json", change)
    with pytest.raises(ValueError, match=r"processor prepares images for .*: 15.*, and this model's is .*: 16"):
        load_preparer(folder)


def test_a_config_that_says_two_numbers_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_seq_length is 576, but by image_layout=.* an image takes 16 tokens"):
        FusedLlavaConfig(image_layout={"name": "fixed", "tokens_per_image": 16})
    folder = edited(run, tmp_path / "two", "config.json", lambda config: config.update(image_seq_length=17))
    with pytest.raises(ValueError, match="image_seq_length is 17"):
        load_config(folder)
