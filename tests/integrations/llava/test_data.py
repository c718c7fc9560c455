"""Reading, checking, preparing and batching LLaVA's data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from integrations.llava.data import Collator, ConversationDataset, check_samples, image_names, read_samples
from integrations.llava.prompts import IGNORE_INDEX, TEMPLATES, TextEncoder
from layerfuse.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from tests.integrations.llava.tiny_parts import human_and_gpt, make_tokenizer

IMAGE = 999
PREPROCESSING = Preprocessing(size=(32, 32), mean=CLIP_MEAN, std=CLIP_STD, mode="pad")


def dataset(folder: Path, samples: list[Any], *, max_length: int = 512, cache_images: int = 1) -> ConversationDataset:
    return ConversationDataset(
        samples,
        image_folder=folder,
        template=TEMPLATES["v1"],
        encoder=TextEncoder(make_tokenizer("llama")),
        preprocessing=PREPROCESSING,
        image_token_id=IMAGE,
        num_image_tokens=5,
        max_length=max_length,
        cache_images=cache_images,
    )


def check(samples: list[Any], folder: Path, template: str = "v1", how: str = "decode") -> None:
    check_samples(samples, image_folder=folder, template=TEMPLATES[template], check_images=how)  # type: ignore[arg-type]


def test_json_and_jsonl_hold_the_same_samples(tmp_path: Path) -> None:
    samples = [
        {"id": 1, "conversations": human_and_gpt("a", "b")},
        {"id": "2", "conversations": human_and_gpt("c", "d")},
    ]
    (tmp_path / "a.json").write_text(json.dumps(samples))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples) + "\n")

    assert read_samples(tmp_path / "a.json") == read_samples(tmp_path / "a.jsonl") == samples


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[]", "holds an empty list"),
        ("a.jsonl", "\n", "holds an empty list"),
        ("a.json", "{}", "holds a dict"),
        ("a.json", "[{]", "not valid JSON"),
    ],
)
def test_a_data_file_that_is_none_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)

    with pytest.raises(ValueError, match=message):
        read_samples(tmp_path / name)


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere.json does not exist"):
        read_samples(tmp_path / "nowhere.json")


def test_good_data_pass_every_check(data_folder: Path) -> None:
    check(read_samples(data_folder / "train.json"), data_folder)
    check(read_samples(data_folder / "pretrain.json"), data_folder, "plain")


@pytest.mark.parametrize(
    ("sample", "problem"),
    [
        ({"conversations": [{"from": "human", "value": "a"}] * 2}, "they have to alternate"),
        ({"conversations": human_and_gpt("only a question")}, "they have to alternate"),
        ({"conversations": []}, "has no 'conversations'"),
        ({}, "has no 'conversations'"),
        ("text", "has no 'conversations'"),
        ({"conversations": [{"from": "system", "value": "a"}]}, "a turn that is not"),
        ({"conversations": human_and_gpt("<image>\na", "b")}, "has 0 images but 1 <image> tags"),
        ({"image": "0.png", "conversations": human_and_gpt("a", "b")}, "has 1 images but 0 <image> tags"),
        ({"image": "0.png", "conversations": human_and_gpt("<image>", "b", "<image>", "c")}, "1 images but 2"),
        ({"image": ["0.png", "1.png"], "conversations": human_and_gpt("<image>", "b")}, "2 images but 1"),
        ({"image": "nowhere.png", "conversations": human_and_gpt("<image>", "b")}, "nowhere.png: missing"),
    ],
)
def test_a_faulty_sample_is_listed_before_training(data_folder: Path, sample: Any, problem: str) -> None:
    good = {"conversations": human_and_gpt("a", "b")}

    with pytest.raises(ValueError, match="1 problems in the data") as error:
        check([good, sample], data_folder)
    assert problem in str(error.value)
    assert "image" in str(error.value) or "sample 1" in str(error.value)


def test_plain_wants_one_caption_for_an_image(data_folder: Path) -> None:
    with pytest.raises(ValueError, match="takes one question and one answer about an image"):
        check([{"conversations": human_and_gpt("a", "b")}], data_folder, "plain")


def test_all_bad_images_are_listed(tmp_path: Path) -> None:
    Image.effect_noise((99, 99), 50).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-2000])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    names = ["good.png", "cut.png", "empty.png", "text.png", "missing.png"]
    samples = [{"image": name, "conversations": human_and_gpt("<image>\na", "b")} for name in names]

    with pytest.raises(ValueError, match="4 problems in the data") as error:
        check(samples, tmp_path)
    for name, fault in [("cut", "corrupt"), ("empty", "corrupt"), ("text", "corrupt"), ("missing", "missing")]:
        assert f"image {tmp_path / name}.png: {fault}" in str(error.value)


def test_reading_sizes_only_does_not_decode(tmp_path: Path) -> None:
    Image.effect_noise((99, 99), 50).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-2000])
    samples = [{"image": "a.png", "conversations": human_and_gpt("<image>\na", "b")}]

    check(samples, tmp_path, how="size")
    with pytest.raises(ValueError, match="corrupt"):
        check(samples, tmp_path, how="decode")


def test_a_long_list_of_problems_is_shortened(data_folder: Path) -> None:
    with pytest.raises(ValueError, match="… and 5 more"):
        check([{}] * 25, data_folder)


def test_a_sample_has_its_images_expanded_and_masked(data_folder: Path) -> None:
    sample = read_samples(data_folder / "train.json")[0]
    item = dataset(data_folder, [sample])[0]
    is_image = item["input_ids"] == IMAGE

    assert int(is_image.sum()) == 5
    assert (item["labels"][is_image] == IGNORE_INDEX).all()
    with Image.open(data_folder / sample["image"]) as image:
        torch.testing.assert_close(item["pixel_values"], PREPROCESSING(image)[None], rtol=0, atol=0)


def test_pixels_are_the_same_with_and_without_cache(data_folder: Path) -> None:
    samples = read_samples(data_folder / "train.json")
    cached, uncached = dataset(data_folder, samples), dataset(data_folder, samples, cache_images=0)

    for _ in range(2):
        torch.testing.assert_close(cached[3]["pixel_values"], uncached[3]["pixel_values"], rtol=0, atol=0)


def test_long_samples_are_cut_but_never_through_an_image(data_folder: Path) -> None:
    samples = read_samples(data_folder / "train.json")[:1]
    whole = dataset(data_folder, samples)[0]
    cut = dataset(data_folder, samples, max_length=len(whole["input_ids"]) - 3)[0]

    assert torch.equal(cut["input_ids"], whole["input_ids"][:-3])
    assert torch.equal(cut["labels"], whole["labels"][:-3])
    with pytest.raises(ValueError, match="sample i0: its images do not fit into max_length=10"):
        dataset(data_folder, samples, max_length=10)[0]


def test_an_image_that_vanished_after_the_check_is_named(tmp_path: Path) -> None:
    samples = [{"image": "gone.png", "conversations": human_and_gpt("<image>\na", "b")}]

    with pytest.raises(ValueError, match=r"gone.png cannot be read"):
        dataset(tmp_path, samples)[0]


def test_lengths_count_words_and_are_negative_without_image(data_folder: Path) -> None:
    samples = [
        {"image": "0.png", "conversations": human_and_gpt("<image>\nWhat is it?", "A boat.")},
        {"conversations": human_and_gpt("Hello there", "Hi")},
        {"conversations": human_and_gpt("", "")},
    ]

    assert dataset(data_folder, samples).lengths == [6, -3, -1]


def test_several_images_come_in_the_order_of_their_tags(data_folder: Path) -> None:
    sample = {"image": ["1.png", "0.png"], "conversations": human_and_gpt("<image> or <image>?", "Both.")}
    item = dataset(data_folder, [sample])[0]

    assert image_names(sample) == ("1.png", "0.png")
    assert int((item["input_ids"] == IMAGE).sum()) == 10
    for position, name in enumerate(image_names(sample)):
        with Image.open(data_folder / name) as image:
            assert torch.equal(item["pixel_values"][position], PREPROCESSING(image))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_is_padded_and_masked(side: Any) -> None:
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    samples = [
        {"input_ids": row, "labels": row, "pixel_values": torch.ones(count, 3, 2, 2)}
        for row, count in zip(rows, (0, 2), strict=True)
    ]
    batch = Collator(0, side=side)(samples)

    padded = [8, 0, 0] if side == "right" else [0, 0, 8]
    assert batch["input_ids"].tolist() == [[5, 6, 7], padded]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [int(token > 0) for token in padded]]
    assert batch["labels"][1].tolist() == [token or IGNORE_INDEX for token in padded]
    assert batch["pixel_values"].shape == (2, 3, 2, 2)


def test_a_batch_without_images_has_no_pixels() -> None:
    batch = Collator(0)([{"input_ids": torch.tensor([1]), "pixel_values": torch.empty(0, 3, 2, 2)}])

    assert batch.keys() == {"input_ids", "attention_mask"}
