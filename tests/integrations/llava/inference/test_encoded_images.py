"""Many questions about one image cost its preparation and encoding once; batches are prepared ahead."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from integrations.llava.config import InjectionConfig
from integrations.llava.inference import answer_likelihoods
from integrations.llava.inference.batching import Shard, form_batches
from integrations.llava.inference.encoded_images import EncodedImages
from integrations.llava.inference.loading import load_batches
from integrations.llava.inference.pictures import PreparedPicture, RecentPictures
from integrations.llava.inference.predictor import Predictor, load_predictor
from integrations.llava.inference.recent import Recent
from tests.integrations.llava.inference.answering_parts import PROMPTS, save_run

KINDS: dict[str, dict[str, Any]] = {
    "injection": {"injection": InjectionConfig(pairs=((1, 0), (4, 1)))},
    "anyres": {"pinpoints": ((32, 64), (64, 32))},
}


@contextmanager
def encoded_tiles(predictor: Predictor) -> Iterator[list[int]]:
    """Numbers of tiles that the backbone is given in each call."""
    calls: list[int] = []
    tower = predictor.model.model.vision_tower
    hook = tower.register_forward_pre_hook(lambda _, given: calls.append(len(given[0])))
    try:
        yield calls
    finally:
        hook.remove()


# Encoded once


@pytest.mark.parametrize("kind", ["mmfuser", *KINDS])
def test_an_image_that_is_asked_about_again_is_encoded_once(
    kind: str, predictor: Predictor, backbone_folder: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    if kind in KINDS:
        predictor = load_predictor(save_run(tmp_path / "run", backbone_folder, **KINDS[kind]))
    one, two, three = pictures[:3]
    images = [one, two, [one, one], None, two.copy(), [three, one], one]
    expected = [predictor([shown], [text], max_new_tokens=8)[0] for shown, text in zip(images, PROMPTS, strict=False)]
    tiles = [predictor.prepare.layout.num_tiles(size) for size in predictor.prepare.sizes([one, two, three])]

    for batch_size in (1, 3, 7):
        with encoded_tiles(predictor) as calls:
            answers = predictor(images, PROMPTS[:7], max_new_tokens=8, batch_size=batch_size)
        assert answers == expected
        assert sum(calls) == sum(tiles)


def test_a_fuser_that_reads_questions_encodes_an_image_for_each(
    backbone_folder: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    options = {"condition_channels": 32, "groups": 2}
    gated = load_predictor(save_run(tmp_path / "run", backbone_folder, fuser="text_gated", fuser_options=options))
    prompts = ["What?", "Sure?", "What?", "What?"]
    images = [pictures[0], pictures[0], pictures[0], pictures[1]]
    expected = [gated([shown], [text], max_new_tokens=8)[0] for shown, text in zip(images, prompts, strict=True)]

    with encoded_tiles(gated) as calls:
        assert gated(images, prompts, max_new_tokens=8, batch_size=2) == expected
    assert sum(calls) == 3


def test_beams_take_encoded_images(predictor: Predictor, pictures: list[Image.Image]) -> None:
    from integrations.llava.inference.sampling import SamplingParams

    sampling = SamplingParams(max_new_tokens=8, num_beams=3)
    images, prompts = [pictures[0], pictures[:2]] * 2, PROMPTS[:4]
    expected = [predictor([shown], [text], sampling=sampling)[0] for shown, text in zip(images, prompts, strict=True)]

    with encoded_tiles(predictor) as calls:
        assert predictor(images, prompts, sampling=sampling, batch_size=4) == expected
    assert calls == [2]


def test_options_of_one_question_share_its_image(predictor: Predictor, pictures: list[Image.Image]) -> None:
    prompts, options = ["What number?"] * 3 + ["Sure?"] * 3, ["one", "two on a wall", "three"] * 2
    images = [pictures[0]] * 3 + [pictures[1]] * 3
    expected = [
        answer_likelihoods(predictor, [shown], [prompt], [option])[0]
        for shown, prompt, option in zip(images, prompts, options, strict=True)
    ]
    positions: list[int] = []
    hook = predictor.model.lm_head.register_forward_pre_hook(lambda _, given: positions.append(given[0].shape[1]))
    with encoded_tiles(predictor) as calls:
        found = answer_likelihoods(predictor, images, prompts, options, batch_size=2)
    hook.remove()

    assert sum(calls) == 2
    # Nowhere but in front of the tokens of answers.
    assert max(positions) == max(len(predictor.prepare.answer_ids(option)) for option in options)
    for own, other in zip(found, expected, strict=True):
        assert own.log_probability == pytest.approx(other.log_probability, abs=1e-4)
        assert own.is_greedy == other.is_greedy


def test_more_bytes_than_allowed_are_not_kept(predictor: Predictor, pictures: list[Image.Image]) -> None:
    batches = [predictor.join([predictor.prepare(picture, "What?")]) for picture in (*pictures[:3], *pictures[:3])]
    each = 16 * 32 * 4
    for most, expected in ((3 * each, 3), (2 * each, 6), (0, 6)):
        encoded = EncodedImages(predictor.model, predictor.prepare.preprocessing, most_bytes=most)
        with encoded_tiles(predictor) as calls, torch.inference_mode():
            for batch in batches:
                encoded(batch)
        assert sum(calls) == expected


def test_what_is_used_stays() -> None:
    recent: Recent[str] = Recent(10)
    recent.put("a", "A", 5)
    recent.put("b", "B", 5)
    assert recent.get("a") == "A"
    recent.put("c", "C", 4)
    recent.put("d", "D", 11)

    assert [recent.get(key) for key in "abcd"] == ["A", None, "C", None]
    recent.put("a", "new", 6)
    assert [recent.get(key) for key in "abc"] == ["new", None, "C"]
    assert pickle.loads(pickle.dumps(recent)).get("a") is None


def test_pictures_are_known_by_path_or_as_the_object_that_they_are(pictures: list[Image.Image]) -> None:
    recent, tiles = RecentPictures(1 << 20), torch.zeros(1, 3, 4, 4)
    prepared = PreparedPicture(tiles, (8, 8))
    recent.keep(pictures[0], prepared)
    recent.keep("a.png", prepared)

    assert recent.find(pictures[0]) is recent.find(Path("a.png")) is prepared
    assert recent.find(pictures[0].copy()) is None
    assert prepared.key != PreparedPicture(tiles, (8, 9)).key
    assert prepared.key != PreparedPicture(tiles + 1, (8, 8)).key
    assert prepared.key == PreparedPicture(tiles.clone(), (8, 8)).key


def test_a_picture_is_prepared_once_for_all_its_questions(
    predictor: Predictor, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from integrations.llava.inference import prompt_builder

    whole, read = prompt_builder.read_image, []
    monkeypatch.setattr(prompt_builder, "read_image", lambda path: (read.append(path), whole(path))[1])
    path = data_folder / "0.png"
    predictor([path, [path, str(path)], path], PROMPTS[:3], max_new_tokens=1, batch_size=1)

    assert read == [path]


# Batches


def test_prompts_about_one_image_follow_each_other_where_lengths_are_alike() -> None:
    lengths = [100, 96, 99, 95, 30, 98, 97]
    groups = ["a", "b", "b", "a", "a", "", ""]

    assert form_batches(lengths, 2, groups=groups) == [[0, 3], [2, 1], [5, 6], [4]]
    assert form_batches(lengths, 2) == [[0, 2], [5, 6], [1, 3], [4]]
    shares = [form_batches(lengths, 2, Shard(index, 2), groups=groups) for index in range(2)]
    assert shares == [[[0, 3], [5, 4]], [[2, 1], [6]]]
    # One image alone is divided among all processes.
    assert form_batches([5] * 6, 2, Shard(1, 3), groups=["a"] * 6) == [[2, 3]]


class Numbers(torch.utils.data.Dataset[dict[str, Any]]):
    def __getitem__(self, index: int) -> dict[str, Any]:
        if index == 9:
            raise ValueError("no such number")
        return {"number": torch.tensor(index)}


def join(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {"numbers": torch.stack([sample["number"] for sample in samples]), "keys": ["text"]}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_come_in_order(num_workers: int) -> None:
    batches = [[3, 1], [2], [8, 7, 6], [0]]
    loaded = load_batches(Numbers(), batches, join, num_workers=num_workers, for_gpu=False)

    assert [batch["numbers"].tolist() for batch in loaded] == batches


def test_an_error_in_a_batch_comes_in_its_place() -> None:
    loaded = load_batches(Numbers(), [[1], [9], [2]], join, num_workers=0, for_gpu=False)
    assert next(loaded)["numbers"].tolist() == [1]
    with pytest.raises(ValueError, match="no such number"):
        next(loaded)


def test_batches_that_nobody_takes_are_not_waited_for() -> None:
    loaded = load_batches(Numbers(), [[1], [2], [3], [9]], join, num_workers=0, for_gpu=False)
    next(loaded)
    loaded.close()  # type: ignore[attr-defined]
