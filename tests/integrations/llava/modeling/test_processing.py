"""The processor: layerfuse's pixels, LLaVA's placeholders, kept by saving and loading."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, LlavaProcessor

from integrations.llava.checkpoints.model_io import load_model
from integrations.llava.inference.predictor import load_predictor
from integrations.llava.modeling.processing import LayerfuseImageProcessor, add_image_token
from layerfuse.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from tests.integrations.llava.tiny_parts import make_tokenizer

PREPROCESSING = Preprocessing(size=(32, 32), mean=CLIP_MEAN, std=CLIP_STD, mode="pad")
PICTURE = Image.new("RGB", (9, 7), "red")
SIZES = [(50, 30), (30, 50), (32, 32), (203, 1), (1, 90), (90, 3)]


@pytest.mark.parametrize("mode", ["pad", "crop", "squash"])
def test_pixels_are_layerfuses_for_every_mode_and_shape(mode: str) -> None:
    preprocessing = dataclasses.replace(PREPROCESSING, mode=mode)
    processor = LayerfuseImageProcessor(preprocessing.to_dict())
    images = [Image.effect_noise(size, 60).convert("RGB") for size in SIZES]

    expected = torch.stack([preprocessing(image) for image in images])
    assert torch.equal(processor(images)["pixel_values"], expected)
    assert torch.equal(processor([[image] for image in images])["pixel_values"], expected)
    assert torch.equal(processor(np.asarray(images[0]))["pixel_values"], expected[:1])


def test_padding_has_the_mean_colour() -> None:
    pixels = LayerfuseImageProcessor(PREPROCESSING.to_dict())(Image.new("RGB", (64, 32)))["pixel_values"][0]
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)

    colour = torch.tensor([int(channel * 255) for channel in CLIP_MEAN]) / 255
    torch.testing.assert_close(pixels[:, 0, 0], (colour - mean) / std)


@pytest.mark.parametrize(("setting", "turns"), [({}, True), ({"upright": True}, True), ({"upright": False}, False)])
def test_inference_turns_pictures_unless_the_processor_says_otherwise(setting: dict[str, bool], turns: bool) -> None:
    """A processor that was saved before there was a choice says nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.effect_noise((50, 30), 60).save(file, format="png", exif=exif)
    image = Image.open(io.BytesIO(file.getvalue()))
    saved = {key: value for key, value in PREPROCESSING.to_dict().items() if key != "upright"}
    seen = LayerfuseImageProcessor(saved | setting)(image)["pixel_values"][0]

    upright = image.transpose(Image.Transpose.ROTATE_270) if turns else image
    assert torch.equal(seen, PREPROCESSING(upright))


def test_the_image_processor_loads_as_it_was_saved(tmp_path: Path) -> None:
    LayerfuseImageProcessor(PREPROCESSING.to_dict()).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)

    assert isinstance(loaded, LayerfuseImageProcessor)
    assert Preprocessing.from_dict(loaded.preprocessing) == PREPROCESSING


def test_an_image_processor_without_preprocessing_is_refused() -> None:
    with pytest.raises(ValueError, match="needs preprocessing"):
        LayerfuseImageProcessor()


def test_the_padding_token_falls_back_on_the_unknown_token() -> None:
    tokenizer = make_tokenizer("llama")
    size = len(tokenizer)

    assert add_image_token(tokenizer) == size
    assert tokenizer.pad_token_id == tokenizer.unk_token_id
    assert add_image_token(tokenizer) == size


def test_the_processor_of_a_run_prepares_what_training_saw(run_folder: Path, data_folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(run_folder)
    assert isinstance(processor, LlavaProcessor)
    predictor = load_predictor(run_folder)
    image = Image.open(data_folder / "0.png")
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What number is it?"}]},
    ]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[image], text=text, return_tensors="pt")
    prepared = predictor.prepare(image, "What number is it?")
    assert predictor.prepare.preprocessing.upright

    assert torch.equal(inputs["input_ids"][0], prepared["input_ids"])
    assert torch.equal(inputs["pixel_values"], predictor.prepare.preprocessing.normalize(prepared["pixel_values"]))


def chw(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


def test_arrays_and_tensors_of_every_layout_give_the_pixels_of_the_image() -> None:
    processor = LayerfuseImageProcessor(PREPROCESSING.to_dict())
    image = Image.effect_noise((50, 30), 60).convert("RGB")
    expected = processor(image)["pixel_values"]
    batch = np.stack([chw(image)] * 2)

    for given in (chw(image), torch.from_numpy(chw(image).copy()), np.asarray(image)):
        assert torch.equal(processor(given)["pixel_values"], expected)
    assert torch.equal(processor(batch)["pixel_values"], expected.repeat(2, 1, 1, 1))
    assert torch.equal(processor(torch.from_numpy(batch))["pixel_values"], expected.repeat(2, 1, 1, 1))
    narrow = np.zeros((3, 8, 3), np.uint8)
    assert processor(narrow, input_data_format="channels_first")["pixel_values"].shape == (1, 3, 32, 32)
    grey = np.asarray(image.convert("L"))
    assert torch.equal(processor(grey)["pixel_values"], processor(image.convert("L"))["pixel_values"])


def test_the_image_processor_returns_what_it_is_asked_for() -> None:
    processor = LayerfuseImageProcessor(PREPROCESSING.to_dict())
    image = Image.new("RGB", (40, 30))
    pixels = processor(image, return_tensors="pt")["pixel_values"]

    assert isinstance(pixels, torch.Tensor)
    found = processor(image, return_tensors="np")["pixel_values"]
    assert isinstance(found, np.ndarray) and np.array_equal(found, pixels.numpy())


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (Image.new("RGB", (8, 8)), {"do_normalise": False}, "takes no option do_normalise; known are return_tensors"),
        (Image.new("RGB", (8, 8)), {"do_normalize": False}, "To prepare images otherwise, change its `preprocessing`"),
        (Image.new("RGB", (8, 8)), {"return_tensors": "tf"}, "return_tensors='tf' is not possible; give 'pt', 'np'"),
        (Image.new("RGB", (8, 8)), {"input_data_format": "nchw"}, "input_data_format='nchw' is unknown; give one of"),
        ("a.png", {}, "'a.png' is a name, not an image; open it first, with PIL.Image.open"),
        (np.zeros((8, 8, 3)), {}, r"an array of float64 with shape \(8, 8, 3\) is no image here; give bytes"),
        (np.zeros((5, 8, 7), np.uint8), {}, "has 5 channels; an image has 1, 3 or 4"),
    ],
)
def test_what_the_image_processor_cannot_take_is_refused(
    given: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LayerfuseImageProcessor(PREPROCESSING.to_dict())(given, **options)


def test_options_of_the_image_processor_are_refused_where_it_is_made(run: Path) -> None:
    with pytest.raises(ValueError, match="takes no option do_normalize, size; known are return_tensors"):
        AutoImageProcessor.from_pretrained(run, do_normalize=False, size={"height": 16, "width": 16})
    with pytest.raises(ValueError, match="takes no option crop_size"):
        AutoImageProcessor.from_pretrained(run, crop_size={"height": 16, "width": 16})
    with pytest.raises(ValueError, match="takes no option nonsense"):
        LayerfuseImageProcessor(PREPROCESSING.to_dict(), nonsense=3)


def test_the_crop_size_is_that_of_the_preprocessing(tmp_path: Path) -> None:
    processor = LayerfuseImageProcessor(PREPROCESSING.to_dict())
    processor.preprocessing = {**processor.preprocessing, "size": [64, 48]}
    processor.save_pretrained(tmp_path)

    assert processor.crop_size == {"height": 64, "width": 48}
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["crop_size"] == processor.crop_size
    assert LayerfuseImageProcessor.from_pretrained(tmp_path)(PICTURE)["pixel_values"].shape[-2:] == (64, 48)


def test_pixels_go_to_the_device_that_is_named() -> None:
    processor = LayerfuseImageProcessor(PREPROCESSING.to_dict())

    assert processor(PICTURE, device="cpu")["pixel_values"].device.type == "cpu"
    assert processor(PICTURE, device="meta")["pixel_values"].device.type == "meta"


def test_a_system_message_stands_in_the_place_of_the_templates_own(run: Path) -> None:
    processor = AutoProcessor.from_pretrained(run)
    user = {"role": "user", "content": [{"type": "text", "text": "What?"}]}
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    plain = processor.apply_chat_template([user], add_generation_prompt=True)

    assert plain.startswith("A chat between") and plain.endswith("USER: What? ASSISTANT:")
    found = processor.apply_chat_template([system, user], add_generation_prompt=True)
    assert found == "Be brief. USER: What? ASSISTANT:"


def test_the_chat_template_marks_what_the_assistant_says(run: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(run).tokenizer
    template = AutoProcessor.from_pretrained(run).chat_template
    chat = [
        {"role": "user", "content": "What number?"},
        {"role": "assistant", "content": "It is one."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "a number"},
    ]
    found = tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [token for token, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]

    assert tokenizer.decode(marked).replace(" ", "") == "Itisone.</s>anumber</s>"


def test_the_names_of_the_models_inputs_are_those_that_the_processor_returns(run: Path) -> None:
    processor = AutoProcessor.from_pretrained(run)
    inputs = processor(text="USER: <image> ASSISTANT:", images=PICTURE, return_tensors="pt")
    assert set(inputs) == set(processor.model_input_names)


def test_a_processor_made_for_another_backbone_is_refused(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "model")
    file = folder / "processor_config.json"
    described = json.loads(file.read_text())
    described["image_processor"]["preprocessing"]["mode"] = "squash"
    file.write_text(json.dumps(described))
    load_model(folder)

    described["image_processor"]["preprocessing"]["mean"] = [0.5, 0.5, 0.5]
    file.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"processor_config.json prepares images with mean \[0.5, 0.5, 0.5\], but the"):
        load_model(folder)
