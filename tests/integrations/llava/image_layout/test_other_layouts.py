"""A layout whose number of tokens depends on an image's size, from data to loss and from prompt to answer.

The vision part is a stub that gives as many tokens as the layout says; all else is the product, which may not notice.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from integrations.llava.checkpoints import convert
from integrations.llava.checkpoints.model_io import load_config, load_model, load_processor, save_model
from integrations.llava.config.schema import Recipe
from integrations.llava.data import BadSampleError, Collator, ConversationDataset, read_samples, survey_samples
from integrations.llava.data.doctor.texts import TokenLimit
from integrations.llava.dry_run.facts import model_facts
from integrations.llava.dry_run.workload import measured_workload
from integrations.llava.image_layout import FixedLayout, ImageLayout, ImageSize
from integrations.llava.inference.predictor import Predictor
from integrations.llava.inference.prompt_builder import load_preparer
from integrations.llava.inference.requests import Request, prompt_lengths
from integrations.llava.inference.results import answer_requests
from integrations.llava.inference.sampling import SamplingParams
from integrations.llava.modeling.build import Assembled
from integrations.llava.modeling.model import FusedLlavaForConditionalGeneration
from integrations.llava.modeling.processing import FusedLlavaProcessor, build_processor
from integrations.llava.modeling.tiling import as_sizes
from integrations.llava.prompts import IGNORE_INDEX, TEMPLATES
from integrations.llava.training.stage import stage_trainer
from layerfuse.preprocessing import Preprocessing
from tests.integrations.llava.inference.answering_parts import PROMPTS, SAMPLED
from tests.integrations.llava.tiny_parts import human_and_gpt


@dataclass(frozen=True)
class CellLayout(ImageLayout):
    """One token per 8 × 8 pixels of the image as it came, cells at the edge included."""

    name: ClassVar[str] = "cells of a test"
    image_size: Sequence[int]

    def num_tokens(self, image_size: ImageSize | None = None) -> int:
        height, width = image_size or self.image_size
        return math.ceil(height / 8) * math.ceil(width / 8)


@dataclass(frozen=True)
class HeightLayout(ImageLayout):
    """One token a pixel row."""

    name: ClassVar[str] = "pixel rows of a test"

    def num_tokens(self, image_size: ImageSize | None = None) -> int:
        return image_size[0] if image_size else 99


def see_by_cells(model: FusedLlavaForConditionalGeneration) -> None:
    """Let the model see as many tokens of an image as its layout says, each a mean of those that it would see."""
    whole, layout = model.model.get_image_features, model.config.layout

    def get_image_features(pixel_values: torch.Tensor, image_sizes: Any = None, **_: Any) -> BaseModelOutputWithPooling:
        assert image_sizes is not None
        tokens = whole(pixel_values).pooler_output
        numbers = [layout.num_tokens(size) for size in as_sizes(image_sizes)]
        resized = [
            torch.nn.functional.adaptive_avg_pool1d(own.T, number).T
            for own, number in zip(tokens, numbers, strict=True)
        ]
        return BaseModelOutputWithPooling(pooler_output=resized)  # type: ignore[arg-type]

    model.model.get_image_features = get_image_features  # type: ignore[assignment]


@pytest.fixture(scope="module")
def cell_run(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of `run`, saved with a layout by cells."""
    model, processor = load_model(run), load_processor(run)
    model.config.image_layout = CellLayout(model.config.image_token_index, [32, 32]).config
    preprocessing = Preprocessing.from_dict(processor.image_processor.preprocessing)
    made = build_processor(model, processor.tokenizer, preprocessing, TEMPLATES["v1"])
    return save_model(model, made, tmp_path_factory.mktemp("cells") / "run")


@pytest.fixture(scope="module")
def cells(cell_run: Path) -> Predictor:
    model = load_model(cell_run)
    assert model.config.layout == CellLayout(model.config.image_token_index, [32, 32])
    see_by_cells(model)
    return Predictor(model, load_processor(cell_run))


def dataset(cells: Predictor, samples: Any, folder: Path, **options: Any) -> ConversationDataset:
    return ConversationDataset(
        samples,
        image_folder=folder,
        template=TEMPLATES["v1"],
        encoder=cells.prepare.encoder,
        preprocessing=cells.prepare.preprocessing,
        layout=cells.prepare.layout,
        **options,
    )


# Training


def test_samples_have_the_tokens_of_their_own_images_and_no_label_on_them(cells: Predictor, data_folder: Path) -> None:
    turns = human_and_gpt("<image> or\n<image>?", "The second.")
    samples = [*read_samples(data_folder / "train.json"), {"image": ["0.png", "5.png"], "conversations": turns}]
    items = list(map(dataset(cells, samples, data_folder).__getitem__, range(len(samples))))
    # 24 × 30, 26 × 30, … pixels; four texts without image; two images.
    expected = [12, 16, 16, 16, 16, 20, 20, 20, 0, 0, 0, 0, 12 + 20]
    for item, number in zip(items, expected, strict=True):
        is_image = item["input_ids"] == cells.prepare.image_token_id
        assert int(is_image.sum()) == number
        assert (item["labels"][is_image] == IGNORE_INDEX).all() and (item["labels"] != IGNORE_INDEX).any()

    assert items[-1]["image_sizes"] == [(24, 30), (34, 30)]
    start = items[-1]["input_ids"].tolist().index(cells.prepare.image_token_id)
    assert (items[-1]["input_ids"][start : start + 12] == cells.prepare.image_token_id).all()
    assert items[-1]["input_ids"][start + 12] != cells.prepare.image_token_id


def test_the_loss_of_a_batch_is_that_of_its_samples(cells: Predictor, data_folder: Path) -> None:
    samples = [read_samples(data_folder / "train.json")[index] for index in (0, 8, 5, 3)]
    items = [dataset(cells, samples, data_folder)[index] for index in range(4)]
    collate = Collator(0)

    def loss(own: list[Any]) -> tuple[torch.Tensor, int]:
        batch = collate(own)
        del batch["sample_ids"]
        return cells.model(**batch).loss, int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())

    together, count = loss(items)
    alone = [loss([item]) for item in items]
    torch.testing.assert_close(together, sum(own * number for own, number in alone) / count)
    together.backward()
    assert all(torch.isfinite(own.grad).all() for own in cells.model.model.fuser.parameters() if own.grad is not None)
    assert any(own.grad is not None and own.grad.any() for own in cells.model.model.fuser.parameters())
    cells.model.zero_grad()


def test_a_stage_trains_on_images_of_any_number_of_tokens(
    cell_run: Path, tiny_recipe: Recipe, data_folder: Path, tmp_path: Path
) -> None:
    model, processor = load_model(cell_run), load_processor(cell_run)
    see_by_cells(model)
    assembled = Assembled(model, processor.tokenizer, model.config.image_token_index, TEMPLATES["v1"])
    config = dataclasses.replace(tiny_recipe.finetune, max_steps=2, group_by_modality=True)
    samples = read_samples(data_folder / "train.json")
    trainer = stage_trainer(assembled, config, samples, None, tmp_path / "finetune", num_processes=1, callbacks=[])
    before = model.lm_head.weight.detach().clone()
    trainer.train()

    assert trainer.state.global_step == 2
    assert not torch.equal(model.lm_head.weight, before)


def test_images_that_do_not_fit_are_told_with_their_own_number(cells: Predictor, data_folder: Path) -> None:
    sample = read_samples(data_folder / "train.json")[5]
    with pytest.raises(BadSampleError, match=r"do not fit into max_length=40 \(they take 20 positions\)"):
        dataset(cells, [sample], data_folder, max_length=40)[0]


def test_more_tags_than_images_are_told_with_the_sample(cells: Predictor, data_folder: Path) -> None:
    sample = {"id": "a", "image": ["0.png", "1.png"], "conversations": human_and_gpt("<image>", "b", "<image><image>")}
    with pytest.raises(BadSampleError, match="sample a: the text has 3 image tokens, and there are 2 images"):
        dataset(cells, [sample], data_folder)[0]


def test_the_doctor_counts_images_at_their_own_size(cells: Predictor, data_folder: Path, tmp_path: Path) -> None:
    sample = {"image": "5.png", "conversations": human_and_gpt("<image>", "b")}
    whole = len(dataset(cells, [sample], data_folder)[0]["input_ids"])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 20)).save(tmp_path / "5.png", exif=exif)

    def kinds(max_length: int, folder: Path = data_folder, layout: ImageLayout = cells.prepare.layout) -> list[str]:
        limit = TokenLimit(cells.prepare.encoder, layout=layout, max_length=max_length, upright=True)
        found = survey_samples([sample], image_folder=folder, template=TEMPLATES["v1"], tokens=limit, workers=1)
        return [finding.kind for finding in found.findings if finding.kind not in {"missing_image", "turned_image"}]

    assert kinds(whole) == []
    assert kinds(whole - 1) == ["too_long"]
    # 20 × 8 pixels once it is turned: one row of three cells.
    assert (kinds(whole - 17, tmp_path), kinds(whole - 18, tmp_path)) == ([], ["too_long"])
    by_height = HeightLayout(cells.prepare.image_token_id)
    assert (kinds(whole - 12, tmp_path, by_height), kinds(whole - 13, tmp_path, by_height)) == ([], ["too_long"])
    # No such file: the model's own size, of 16 cells.
    gone = tmp_path / "nowhere"
    assert (kinds(whole - 4, gone), kinds(whole - 5, gone)) == ([], ["too_long"])


def test_no_file_is_opened_for_a_layout_that_does_not_depend_on_the_size(
    cells: Predictor, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("PIL.Image.open", refuse)
    sample = {"image": "5.png", "conversations": human_and_gpt("<image>", "b")}
    fixed = FixedLayout(cells.prepare.image_token_id, 16)
    limit = TokenLimit(cells.prepare.encoder, layout=fixed, max_length=512)
    assert list(limit.faults(sample, TEMPLATES["v1"], data_folder)) == []
    monkeypatch.setattr(cells.prepare, "layout", fixed)
    assert len(prompt_lengths([Request(1, ("5.png",), "What?")], cells.prepare, image_folder=data_folder)) == 1


def test_a_dry_run_counts_images_at_the_models_own_size(cell_run: Path) -> None:
    model = load_model(cell_run).to("meta")  # type: ignore[arg-type]
    model.config.image_layout["image_size"] = [32, 40]

    assert model_facts(model).tokens_per_image == 20


def test_a_dry_run_counts_the_tokens_of_the_images_as_their_files_are(tiny_recipe: Recipe, data_folder: Path) -> None:
    turns = human_and_gpt("<image> or\n<image>?", "b")
    samples = [*read_samples(data_folder / "train.json"), {"image": ["0.png", "gone.png"], "conversations": turns}]
    work = measured_workload(samples, tiny_recipe.finetune, CellLayout(1, [32, 32]), TEMPLATES["v1"])

    # As above; of an image without file, as of one of the model's own size.
    tokens = [12, 16, 16, 16, 16, 20, 20, 20, 0, 0, 0, 0, 12 + 16]
    assert work.image_tokens == pytest.approx(sum(tokens) / 13)
    assert work.images == pytest.approx(10 / 13)
    assert work.tokens == pytest.approx(work.image_tokens + work.text_tokens)


def test_a_copy_by_convert_keeps_the_layout(cell_run: Path, tmp_path: Path) -> None:
    copied = convert(cell_run, tmp_path / "copy", "layerfuse")

    assert load_config(copied).layout == load_config(cell_run).layout
    assert load_preparer(copied).layout == load_preparer(cell_run).layout


# Answers


def test_prompts_take_the_tokens_of_their_images(cells: Predictor, data_folder: Path) -> None:
    """By path, picture and file of questions; pictures that Exif turns count as they are seen."""
    text = len(cells.prepare(None, "What?")["input_ids"])
    names, numbers = ["0.png", "4.png", "5.png"], [12, 16, 20]
    for name, number in zip(names, numbers, strict=True):
        for image in (data_folder / name, Image.open(data_folder / name)):
            length = len(cells.prepare(image, "What?")["input_ids"])
            assert length - number == len(cells.prepare(data_folder / "0.png", "What?")["input_ids"]) - 12 > text

    requests = [Request(index, (name,), "What?") for index, name in enumerate(names)]
    requests += [Request(3, ("0.png", "5.png"), "What?"), Request(4, (), "What?"), Request(5, ("gone.png",), "What?")]
    lengths = prompt_lengths(requests, cells.prepare, image_folder=data_folder)
    own = [cells.prepare([data_folder / name for name in each.images], each.prompt) for each in requests[:5]]
    assert lengths[:5] == [len(each["input_ids"]) for each in own]
    assert lengths[5] == lengths[1]  # no such file: counted at the model's own size

    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.new("RGB", (90, 8)).save(file, format="png", exif=exif)
    turned = Image.open(io.BytesIO(file.getvalue()))
    assert cells.prepare.sizes([turned]) == [(90, 8)]
    assert cells.prepare(turned, "What?")["image_sizes"] == [(90, 8)]


@pytest.mark.parametrize(
    "sampling", [SamplingParams(max_new_tokens=8), SAMPLED, SamplingParams(max_new_tokens=8, num_beams=3)], ids=str
)
def test_answers_in_a_batch_are_those_alone(cells: Predictor, mixture: list[Any], sampling: SamplingParams) -> None:
    together = cells(mixture, PROMPTS, sampling=sampling, batch_size=8)
    keyed = [
        cells.answer_batch(cells.collate([cells.prepare(images, prompt)]), [str(index)], sampling)[0]
        for index, (images, prompt) in enumerate(zip(mixture, PROMPTS, strict=True))
    ]

    assert together == keyed
    assert len(set(together)) > 4
    if sampling.num_beams == 1:
        assert "".join(cells.stream(mixture[2], PROMPTS[2], sampling=sampling))


def test_the_processor_writes_the_tokens_of_each_image(cell_run: Path, cells: Predictor, pictures: Any) -> None:
    processor = AutoProcessor.from_pretrained(cell_run)
    inputs = processor(images=[pictures[0], pictures[3]], text="<image> or\n<image>?", return_tensors="pt")
    counted = processor._get_num_multimodal_tokens([(24, 30), (34, 30)])

    assert isinstance(processor, FusedLlavaProcessor)
    assert int((inputs["input_ids"] == cells.prepare.image_token_id).sum()) == 12 + 16
    assert inputs["image_sizes"].tolist() == [[24, 30], [30, 30]]
    assert counted.num_image_tokens == [12, 20]
    assert processor._get_num_multimodal_tokens().num_image_tokens is None
    options = {"max_new_tokens": 4, "do_sample": False}
    for beams in (1, 2):
        answered = cells.model.generate(**inputs, **options, num_beams=beams)
        assert answered.shape[1] > inputs["input_ids"].shape[1]


def test_a_file_of_questions_is_answered_as_one_by_one(
    cells: Predictor, cell_run: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("integrations.llava.inference.results.load_predictor", lambda *_, **__: cells)
    names = [("0.png",), ("5.png", "1.png"), (), ("7.png",)]
    requests = [Request(str(index), own, "What number?") for index, own in enumerate(names)]
    output, answered = answer_requests(
        requests,
        cell_run,
        tmp_path / "answers.jsonl",
        image_folder=data_folder,
        sampling=SamplingParams(max_new_tokens=6),
        batch_size=4,
    )
    images = [[data_folder / name for name in own] for own in names]

    assert answered == 4
    assert [output.answers[str(index)] for index in range(4)] == cells(images, ["What number?"] * 4, max_new_tokens=6)
