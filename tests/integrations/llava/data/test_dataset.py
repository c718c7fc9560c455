"""Samples prepared for the model, and joined to batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from integrations.llava.data import (
    BadSampleError,
    Collator,
    ConversationDataset,
    Selection,
    image_names,
    read_samples,
)
from integrations.llava.data import dataset as dataset_module
from integrations.llava.image_layout import FixedLayout
from integrations.llava.prompts import IGNORE_INDEX, TEMPLATES, TextEncoder
from layerfuse.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from tests.integrations.llava.tiny_parts import human_and_gpt, make_tokenizer

IMAGE = 999
PREPROCESSING = Preprocessing(size=(32, 32), mean=CLIP_MEAN, std=CLIP_STD, mode="pad")


def dataset(folder: Path, samples: Any, **options: Any) -> ConversationDataset:
    return ConversationDataset(
        samples,
        image_folder=folder,
        template=TEMPLATES["v1"],
        encoder=TextEncoder(make_tokenizer("llama")),
        preprocessing=PREPROCESSING,
        layout=FixedLayout(IMAGE, 5),
        **({"max_length": 512} | options),
    )


def test_a_sample_has_its_images_expanded_and_masked(data_folder: Path) -> None:
    sample = read_samples(data_folder / "train.json")[0]
    item = dataset(data_folder, [sample])[0]
    is_image = item["input_ids"] == IMAGE

    assert int(is_image.sum()) == 5
    assert (item["labels"][is_image] == IGNORE_INDEX).all()
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    with Image.open(data_folder / sample["image"]) as image:
        assert torch.equal(item["pixel_values"], PREPROCESSING.pixels(image)[None])


def test_a_sample_carries_its_id_as_text_or_its_index_in_the_file(data_folder: Path) -> None:
    turns = {"conversations": human_and_gpt("a", "b")}
    samples = [{"id": 0} | turns, turns, {"id": "x"} | turns, {"id": None} | turns]

    assert [item["id"] for item in dataset(data_folder, samples)] == ["0", "1", "x", "3"]  # type: ignore[attr-defined]
    selected = dataset(data_folder, Selection(samples, [3, 2]))
    assert [selected[0]["id"], selected[1]["id"]] == ["3", "x"]


def test_texts_are_kept_as_long_as_they_fit(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = read_samples(data_folder / "train.json")
    kept, unkept = dataset(data_folder, samples), dataset(data_folder, samples)
    first = [kept[index] for index in range(len(samples))]
    monkeypatch.setattr(ConversationDataset, "render", None)
    for index, item in enumerate(first):
        assert torch.equal(kept[index]["input_ids"], item["input_ids"])
        assert torch.equal(kept[index]["labels"], item["labels"])

    monkeypatch.undo()
    monkeypatch.setattr(dataset_module, "_KEEP_RENDERED", 3 * 8 * len(unkept.render(0).input_ids))
    for index in range(len(samples)):
        assert torch.equal(unkept[index]["input_ids"], first[index]["input_ids"])
    assert 1 <= len(unkept._texts) <= 4


def test_what_is_asked_is_kept_with_the_text(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [
        {"image": ["0.png", "1.png"], "conversations": human_and_gpt("<image><image>\nWhich?", "One.", "Sure?")},
        {"conversations": human_and_gpt("What is one?", "A number.")},
    ]
    data = dataset(data_folder, samples, with_condition=True)
    first = [data[index] for index in range(2)]
    assert [len(item["condition"]) for item in first] == [2, 0]
    monkeypatch.setattr(TextEncoder, "__call__", None)
    for index, item in enumerate(first):
        again = data[index]["condition"]
        assert all(
            torch.equal(*pair) and pair[0].dtype == torch.int64 for pair in zip(again, item["condition"], strict=True)
        )
    assert data._text_bytes == sum(array.nbytes for kept in data._texts.values() for array in kept)


def test_worker_processes_read_the_same_samples(data_folder: Path) -> None:
    data = dataset(data_folder, read_samples(data_folder / "train.json"))
    loader: DataLoader[Any] = DataLoader(data, batch_size=4, collate_fn=Collator(0), num_workers=2)
    batches = [Collator(0)([data[index] for index in range(start, start + 4)]) for start in (0, 4, 8)]

    for loaded, made in zip(loader, batches, strict=True):
        assert loaded.pop("sample_ids") == made.pop("sample_ids")
        torch.testing.assert_close(loaded, made, rtol=0, atol=0)


def test_cutting_once_is_cutting_before_and_after_images_are_expanded(data_folder: Path) -> None:
    """The published code cuts twice at the same length."""
    sample = {"image": "0.png", "conversations": human_and_gpt("<image>\nWhat number is it?", "It is number one.")}
    data = dataset(data_folder, [sample])
    rendered = data.render(0)
    last_of_image = rendered.input_ids.index(IMAGE) + 5

    for data.max_length in range(last_of_image, len(rendered.input_ids) + 6):
        twice = []
        for values in (rendered.input_ids, rendered.labels):
            expanded: list[int] = []
            for token, value in list(zip(rendered.input_ids, values, strict=True))[: data.max_length]:
                expanded += [value] * (5 if token == IMAGE else 1)
            twice.append(expanded[: data.max_length])
        assert [data[0]["input_ids"].tolist(), data[0]["labels"].tolist()] == twice
    data.max_length = last_of_image - 1
    with pytest.raises(BadSampleError, match="its images do not fit"):
        data[0]


def test_long_samples_are_cut_but_never_through_an_image(data_folder: Path) -> None:
    samples = read_samples(data_folder / "train.json")[:1]
    whole = dataset(data_folder, samples)[0]
    cut = dataset(data_folder, samples, max_length=len(whole["input_ids"]) - 3)[0]

    assert torch.equal(cut["input_ids"], whole["input_ids"][:-3])
    assert torch.equal(cut["labels"], whole["labels"][:-3])
    with pytest.raises(BadSampleError, match="sample i0: its images do not fit into max_length=10"):
        dataset(data_folder, samples, max_length=10)[0]


def test_an_image_that_vanished_after_the_check_is_named(tmp_path: Path) -> None:
    samples = [{"id": 5, "image": "gone.png", "conversations": human_and_gpt("<image>\na", "b")}]

    with pytest.raises(BadSampleError, match=r"sample 5: image .*gone.png cannot be read"):
        dataset(tmp_path, samples)[0]


def test_a_sample_that_cannot_be_read_is_void_if_it_may_be_skipped(data_folder: Path) -> None:
    gone = {"id": 5, "image": "gone.png", "conversations": human_and_gpt("<image>\na", "b")}
    good = read_samples(data_folder / "train.json")[0]
    data = dataset(data_folder, [gone, good], bad_samples="skip")
    batch = Collator(0)([data[0], data[1]])

    assert data[0]["input_ids"].tolist() == [1]
    assert data[0]["labels"].tolist() == [IGNORE_INDEX]
    assert data[0]["pixel_values"].shape == (0, 3, 32, 32)
    assert batch["sample_ids"] == ["5", "i0"]
    assert len(batch["skipped"]) == 1
    assert "gone.png cannot be read" in batch["skipped"][0]
    assert (batch["labels"][0] == IGNORE_INDEX).all()
    torch.testing.assert_close(batch["labels"][1], data[1]["labels"], rtol=0, atol=0)
    assert "skipped" not in data[1]
    assert dataset(data_folder, [good], bad_samples="skip", max_length=9)[0]["skipped"].startswith("sample i0: its")


def test_a_void_sample_ends_where_a_tokenizer_has_no_beginning(tmp_path: Path) -> None:
    data = dataset(
        tmp_path, [{"image": "gone.png", "conversations": human_and_gpt("<image>", "b")}], bad_samples="skip"
    )
    data.encoder.begin = []

    assert data[0]["input_ids"].tolist() == [data.encoder.end]


def test_lengths_count_words_and_are_negative_without_image(data_folder: Path) -> None:
    samples = [
        {"image": "0.png", "conversations": human_and_gpt("<image>\nWhat is it?", "A boat.")},
        {"conversations": human_and_gpt("Hello there", "Hi")},
        {"conversations": human_and_gpt("", "")},
        {"image": [], "conversations": human_and_gpt("no image", "")},
    ]

    assert dataset(data_folder, samples).lengths == [6, -3, -1, -2]


def test_several_images_come_in_the_order_of_their_tags(data_folder: Path) -> None:
    sample = {"image": ["1.png", "0.png"], "conversations": human_and_gpt("<image> or <image>?", "Both.")}
    item = dataset(data_folder, [sample])[0]

    assert image_names(sample) == ("1.png", "0.png")
    assert int((item["input_ids"] == IMAGE).sum()) == 10
    for position, name in enumerate(image_names(sample)):
        with Image.open(data_folder / name) as image:
            assert torch.equal(item["pixel_values"][position], PREPROCESSING.pixels(image))


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
