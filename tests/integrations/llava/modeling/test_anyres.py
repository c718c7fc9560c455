"""AnyRes in the model: equal to LLaVA-NeXT with its weights; every fuser; injection and questions; generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from integrations.llava.checkpoints import load_model
from integrations.llava.checkpoints.model_io import save_model
from integrations.llava.config import InjectionConfig
from integrations.llava.image_layout import AnyResLayout, ImageSize, default_pinpoints
from integrations.llava.modeling import FusedLlavaForConditionalGeneration, build_processor
from integrations.llava.modeling.build import build_model
from integrations.llava.modeling.processing import add_image_token
from integrations.llava.modeling.tiling import pack_tiles
from integrations.llava.prompts import TEMPLATES
from layerfuse.backbones import Backbone, create_backbone, create_backbone_group
from layerfuse.fusers import create_fuser, list_fusers
from layerfuse.preprocessing import prepare_tiles
from layerfuse.testing import randomise_parameters
from tests.integrations.llava.tiny_parts import make_tokenizer, tiny_clip, tiny_llm

VOCABULARY, IMAGE = 50, 49
PINPOINTS = default_pinpoints((32, 32))
LAYOUT = AnyResLayout(IMAGE, (32, 32), (4, 4), PINPOINTS)
SIZES: tuple[ImageSize, ...] = ((40, 60), (32, 32), (5, 400), (64, 64), (300, 9), (33, 97))
EXACT = {"atol": 1e-6, "rtol": 1e-6}


@pytest.fixture(scope="module")
def theirs() -> LlavaNextForConditionalGeneration:
    torch.manual_seed(0)
    config = LlavaNextConfig(
        vision_config=tiny_clip().config.to_dict(),
        text_config=tiny_llm(VOCABULARY).config.to_dict(),
        image_token_index=IMAGE,
        image_grid_pinpoints=list(map(list, PINPOINTS)),
        vision_feature_layer=-2,
        image_seq_length=16,
    )
    model = LlavaNextForConditionalGeneration(config).eval()
    randomise_parameters(model)
    return model


@pytest.fixture(scope="module")
def ours(theirs: LlavaNextForConditionalGeneration) -> FusedLlavaForConditionalGeneration:
    """Their weights, under the same names but for the vision model's."""
    backbone = create_backbone(theirs.model.vision_tower, layers=(-2,), copy=True)
    fuser = create_fuser("select", in_channels=32, num_layers=1)
    llm = LlamaForCausalLM(theirs.config.text_config)
    model = build_model(backbone, fuser, llm, image_token_id=IMAGE, layout=LAYOUT).eval()
    shared = {name: own for name, own in theirs.state_dict().items() if "vision_tower" not in name}
    assert {"model.image_newline", "lm_head.weight"} <= shared.keys()
    missing, unexpected = model.load_state_dict(shared, strict=False)
    assert not unexpected and all("vision_tower" in name for name in missing)
    return model


def inputs(sizes: tuple[ImageSize, ...] = SIZES, *, images_per_row: int = 2) -> dict[str, torch.Tensor]:
    """Random tiles, filled up as processors do, and texts of several images, padded on the left."""
    torch.manual_seed(1)
    most = max(map(LAYOUT.num_tiles, sizes))
    pixels = torch.zeros(len(sizes), most, 3, 32, 32)
    for own, size in zip(pixels, sizes, strict=True):
        own[: LAYOUT.num_tiles(size)] = torch.randn(LAYOUT.num_tiles(size), 3, 32, 32)
    rows = []
    for start in range(0, len(sizes), images_per_row):
        images = [[IMAGE] * LAYOUT.num_tokens(size) for size in sizes[start : start + images_per_row]]
        rows.append([1, *(token for own in images for token in [5, *own]), 6, 7])
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values": pixels,
        "image_sizes": torch.tensor(sizes),
    }


def flat(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tiles without those that fill up."""
    counts = [LAYOUT.num_tiles(tuple(size)) for size in given["image_sizes"].tolist()]  # type: ignore[arg-type]
    tiles = [own[:count] for own, count in zip(given["pixel_values"], counts, strict=True)]
    return given | {"pixel_values": torch.cat(tiles)}


# Equal to theirs


@torch.no_grad()
def test_features_and_logits_are_theirs(theirs: Any, ours: Any) -> None:
    given = inputs()
    features = theirs.model.get_image_features(given["pixel_values"], given["image_sizes"])
    found = ours.model.get_image_features(given["pixel_values"], image_sizes=given["image_sizes"])

    assert len(found.pooler_output) == len(SIZES)
    for own, other, size in zip(found.pooler_output, features.pooler_output, SIZES, strict=True):
        assert len(own) == LAYOUT.num_tokens(size)
        torch.testing.assert_close(own, other, **EXACT)
    expected = theirs(**given).logits
    real = given["attention_mask"].bool()
    for form in (given, flat(given)):
        torch.testing.assert_close(ours(**form).logits[real], expected[real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("beams", "images_per_row"), [(1, 2), (3, 1)])
def test_generated_tokens_are_theirs_with_beams_too(beams: int, images_per_row: int, theirs: Any, ours: Any) -> None:
    """One image a text with beams: transformers 5.17 repeats image by image."""
    given = inputs(images_per_row=images_per_row)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    expected = theirs.generate(**given, **options)
    for form in (given, flat(given)):
        assert torch.equal(ours.generate(**form, **options), expected)


@torch.no_grad()
def test_embedded_texts_with_more_images_or_tiles_than_texts_are_answered_as_their_ids(ours: Any) -> None:
    given, options = inputs(), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for form in (given, flat(given)):
        expected = ours.generate(**form, **options)[:, form["input_ids"].shape[1] :]
        form["inputs_embeds"] = ours.get_input_embeddings()(form.pop("input_ids"))
        assert torch.equal(ours.generate(**form, **options), expected)


@torch.no_grad()
def test_beams_repeat_the_images_of_each_text_together(ours: Any) -> None:
    """However transformers does it."""
    given = inputs(SIZES[:3])
    encoded = ours.get_image_features(given["pixel_values"], image_sizes=given["image_sizes"])
    ids, rest = ours._expand_inputs_for_generation(
        2, False, given["input_ids"], mm_encoder_outputs={"image": encoded}, attention_mask=given["attention_mask"]
    )
    repeated = rest["mm_encoder_outputs"]["image"].pooler_output

    assert torch.equal(ids, given["input_ids"][[0, 0, 1, 1]]) and len(rest["attention_mask"]) == 4
    for own, image in zip(repeated, (0, 1, 0, 1, 2, 2), strict=True):
        assert torch.equal(own, encoded.pooler_output[image])


@torch.no_grad()
def test_the_overview_alone_is_the_model_without_tiles_and_a_newline(ours: Any) -> None:
    lone, fixed = (
        build_model(
            ours.model.vision_tower.backbone,
            ours.model.fuser,
            tiny_llm(VOCABULARY),
            image_token_id=IMAGE,
            layout=AnyResLayout(IMAGE, (32, 32), (4, 4), ()) if tiled else None,
        ).eval()
        for tiled in (True, False)
    )
    lone.model.multi_modal_projector = fixed.model.multi_modal_projector
    pixels, sizes = torch.randn(2, 3, 32, 32), torch.tensor([[9, 9], [90, 5]])
    with_newline = lone.model.get_image_features(pixels, image_sizes=sizes).pooler_output
    plain = fixed.model.get_image_features(pixels).pooler_output

    assert fixed.model.image_newline is None and "model.image_newline" not in fixed.state_dict()
    for own, other in zip(with_newline, plain, strict=True):
        assert torch.equal(own, torch.cat([other, lone.model.image_newline[None]]))


def test_a_new_newline_is_drawn_as_theirs() -> None:
    llm = tiny_llm(VOCABULARY, hidden_size=1024, num_hidden_layers=1, intermediate_size=8)
    backbone = create_backbone(tiny_clip(), layers=(1,))
    model = build_model(
        backbone, create_fuser("select", in_channels=32, num_layers=1), llm, image_token_id=IMAGE, layout=LAYOUT
    )
    newline = model.model.image_newline
    assert newline is not None and newline.requires_grad
    assert newline.std().item() == pytest.approx(1024**-0.5, rel=0.1)


# Fusers, questions, injection


OPTIONS: dict[str, dict[str, Any]] = {
    "mmfuser": {"num_heads": 4},
    "cross_attention": {"num_heads": 4},
    "attention_pool": {"num_heads": 2},
    "depth_attention": {"num_heads": 2},
    "spatial_aggregator": {"num_heads": 2},
    "text_gated": {"condition_channels": 32, "groups": 2},
    "dense_connector": {"mode": "sci"},
}
REFUSED = {"token_concat"}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return create_backbone(tiny_clip(), layers=(1, 2, 3, 4))


def fused(backbone: Backbone, fuser: str, **settings: Any) -> FusedLlavaForConditionalGeneration:
    torch.manual_seed(0)
    made = create_fuser(fuser, in_channels=32, num_layers=4, options=OPTIONS.get(fuser))
    grid = made.out_grid(backbone.grids())
    assert grid is not None
    layout = AnyResLayout(IMAGE, (32, 32), grid, PINPOINTS)
    return build_model(backbone, made, tiny_llm(VOCABULARY), image_token_id=IMAGE, layout=layout, **settings).eval()


@pytest.mark.parametrize("fuser", list_fusers())
def test_every_fuser_runs_or_is_refused(fuser: str, backbone: Backbone) -> None:
    if fuser in REFUSED:
        with pytest.raises(ValueError, match=rf"'{fuser}' puts 48 tokens of an image outside of a grid, .*'concat'"):
            fused(backbone, fuser)
        return
    model, sizes = fused(backbone, fuser), torch.tensor(SIZES)
    condition = torch.randn(len(SIZES), 32) if model.model.fuser.condition_channels else None
    given = flat(inputs())
    output = model.model.get_image_features(given["pixel_values"], image_sizes=sizes, condition=condition)
    lengths = [len(own) for own in output.pooler_output]

    assert lengths == [model.config.layout.num_tokens(size) for size in SIZES]
    sum(own.square().mean() for own in output.pooler_output).backward()
    assert model.model.image_newline.grad.any()
    # Alone as among others.
    count = LAYOUT.num_tiles(SIZES[0])
    alone = model.model.get_image_features(
        given["pixel_values"][:count], image_sizes=sizes[:1], condition=None if condition is None else condition[:1]
    )
    torch.testing.assert_close(alone.pooler_output[0], output.pooler_output[0], atol=1e-5, rtol=1e-5)


def test_dense_connectors_pooled_tokens_are_refused(backbone: Backbone) -> None:
    fuser = create_fuser("dense_connector", in_channels=32, num_layers=4, options={"mode": "sti"})
    with pytest.raises(ValueError, match="'dense_connector' puts .* outside of a grid"):
        build_model(backbone, fuser, tiny_llm(VOCABULARY), image_token_id=IMAGE, layout=LAYOUT)


def test_tokens_on_no_grid_are_refused(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    fuser = create_fuser("concat", in_channels=32, num_layers=4)
    monkeypatch.setattr(type(fuser), "out_grid", lambda self, grids: None)
    with pytest.raises(ValueError, match="the fuser 'concat' puts no token on a grid"):
        build_model(backbone, fuser, tiny_llm(VOCABULARY), image_token_id=IMAGE, layout=LAYOUT)


def test_a_layout_of_other_tiles_is_refused(backbone: Backbone) -> None:
    fuser = create_fuser("concat", in_channels=32, num_layers=4)
    other = AnyResLayout(IMAGE, (64, 32), (4, 4), ())
    with pytest.raises(ValueError, match=r"tiles have \(64, 32\) pixels and \(4, 4\) tokens, but the backbone takes"):
        build_model(backbone, fuser, tiny_llm(VOCABULARY), image_token_id=IMAGE, layout=other)


@torch.no_grad()
def test_a_question_is_read_with_every_tile_of_its_image(backbone: Backbone) -> None:
    model = fused(backbone, "text_gated")
    randomise_parameters(model.model.fuser)
    given, questions = flat(inputs()), torch.randn(len(SIZES), 32)
    together = model.model.get_image_features(
        given["pixel_values"], image_sizes=given["image_sizes"], condition=questions
    )
    tiles = given["pixel_values"].split([LAYOUT.num_tiles(size) for size in SIZES])
    for index, (own, question) in enumerate(zip(tiles, questions, strict=True)):
        features = model.model.vision_tower(own)
        expected = model.model.fuser(features, question.expand(len(own), -1))
        found = together.last_hidden_state.split(list(map(len, tiles)))[index]
        torch.testing.assert_close(found, expected, **EXACT)
    logits = model(**given, condition=questions).logits
    other = model(**given, condition=-questions).logits
    assert (logits - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match="condition has 5 rows for 6 images"):
        model(**given, condition=questions[:5])


@torch.no_grad()
def test_injected_tokens_lie_where_the_inputs_do_and_newlines_get_nothing() -> None:
    torch.manual_seed(0)
    tapped = create_backbone(tiny_clip(), layers=(1, 2, 3, 4, 5))
    injection = InjectionConfig(pairs=((5, 0), (2, 1)))
    model = fused(tapped, "concat", injection=injection)
    given = inputs()
    plain = model(**given).logits
    assert model.model.injection is not None
    kept, model.model.injection = model.model.injection, None
    assert torch.equal(plain, model(**given).logits)  # mergers start at zero, also on newlines
    model.model.injection = kept
    randomise_parameters(kept)
    assert not torch.allclose(model(**given).logits, plain, atol=1e-2)

    output = model.model.get_image_features(given["pixel_values"], image_sizes=given["image_sizes"])
    pixels = flat(given)["pixel_values"]
    merged = kept(model.model.vision_tower(pixels))
    counts = list(map(LAYOUT.num_tiles, SIZES))
    for packed, tokens in zip(output.deepstack_features, merged, strict=True):
        for own, tiles, size, whole in zip(packed, tokens.split(counts), SIZES, output.pooler_output, strict=True):
            assert own.shape == whole.shape
            assert torch.equal(own, pack_tiles(tiles, LAYOUT, size, torch.zeros(32)))
            is_newline = (whole == model.model.image_newline).all(-1)
            # Of the flattest image not one row of cells is left.
            assert bool(is_newline.any()) == (size != (5, 400)) and not own[is_newline].any()
    for beams in (1, 2):
        one, other = (
            model.generate(**form, max_new_tokens=4, do_sample=False, num_beams=beams, pad_token_id=0)
            for form in (given, flat(given))
        )
        assert torch.equal(one, other)


@torch.no_grad()
def test_several_backbones_see_the_same_tiles() -> None:
    """The smaller one sees each scaled down; a tile has the size of the larger."""
    torch.manual_seed(0)
    small = tiny_clip(image_size=16, patch_size=4)
    group = create_backbone_group([tiny_clip(), small], layers=[(1, 3), (2,)])
    fuser = create_fuser("concat", in_channels=32, num_layers=3)
    model = build_model(group, fuser, tiny_llm(VOCABULARY), image_token_id=IMAGE, layout=LAYOUT).eval()
    picture = Image.effect_noise((97, 33), 50)
    canvas = LAYOUT.canvas((33, 97))
    tiles = prepare_tiles(picture, group.preprocessing, canvas)
    large, other = group.preprocessing.parts
    expected = prepare_tiles(picture, large, canvas)

    assert tiles.shape == (LAYOUT.num_tiles((33, 97)), 6, 32, 32)
    assert torch.equal(tiles[:, :3], expected)
    assert torch.equal(tiles[0, 3:, :16, :16], other(picture)) and not tiles[:, 3:, 16:].any()
    sizes = torch.tensor([[33, 97]])
    packed = model.model.get_image_features(tiles, image_sizes=sizes).pooler_output[0]
    alone = model.model.multi_modal_projector(model.model.fuser(group(tiles)))
    assert model.model.image_newline is not None
    assert torch.equal(packed, pack_tiles(alone, LAYOUT, (33, 97), model.model.image_newline))


# What is given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_sizes": None}, r"image_sizes is missing; give \(images, 2\), height and"),
        ({"pixel_values": torch.zeros(5, 3, 32, 32)}, r"shape \(5, 3, 32, 32\), but images of .* have \[5, 3, 4, 5, 4"),
        ({"pixel_values": torch.zeros(6, 3, 3, 32, 32)}, r"shape \(6, 3, 3, 32, 32\), but images of"),
        ({"image_sizes": torch.tensor([40, 60])}, r"image_sizes has shape \(2,\); give \(images, 2\), height and"),
        ({"image_sizes": torch.ones(6, 3)}, r"image_sizes has shape \(6, 3\); give \(images, 2\)"),
        ({"image_sizes": torch.tensor([[0, 5]] * 6)}, "an image of 0 x 5 pixels .height x width. has none"),
        ({"image_sizes": torch.tensor([[5, -1]] * 6)}, "an image of 5 x -1 pixels .height x width. has none"),
    ],
)
def test_tiles_and_sizes_that_do_not_go_together_are_refused(change: Any, message: str, ours: Any) -> None:
    with pytest.raises(ValueError, match=message):
        ours(**(inputs() | change))


def test_a_batch_without_images_touches_the_newline_with_weight_zero(backbone: Backbone) -> None:
    model = fused(backbone, "concat").train()
    ids = torch.tensor([[1, 5, 6]])
    model(input_ids=ids, labels=ids).loss.backward()
    newline = model.model.image_newline
    assert newline is not None and newline.grad is not None and not newline.grad.any()
    model.zero_grad()


# Saved


def test_saved_and_loaded_with_processor_and_auto_classes(backbone: Backbone, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer("llama")
    token = add_image_token(tokenizer)
    fuser = create_fuser("concat", in_channels=32, num_layers=4)
    layout = AnyResLayout(token, (32, 32), (4, 4), PINPOINTS)
    llm = tiny_llm(len(tokenizer), max_position_embeddings=512)
    template = TEMPLATES["v1"]
    model = build_model(
        backbone, fuser, llm, image_token_id=token, layout=layout, prompt_template=template.to_dict()
    ).eval()
    folder = save_model(model, build_processor(model, tokenizer, backbone.preprocessing, template), tmp_path / "run")
    loaded, auto = load_model(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)

    assert loaded.config.layout == auto.config.layout == layout
    assert torch.equal(loaded.model.image_newline, model.model.image_newline)
    images = [Image.new("RGB", (60, 40), "red"), Image.new("RGB", (7, 90), "blue"), Image.new("RGB", (32, 32))]
    texts = ["<image> or <image>?", "<image>?"]
    given = processor(images=[images[:2], images[2:]], text=texts, return_tensors="pt", padding=True)
    sizes = [(40, 60), (90, 7), (32, 32)]
    counted = processor._get_num_multimodal_tokens(sizes)

    assert given["image_sizes"].tolist() == list(map(list, sizes))
    assert given["pixel_values"].shape == (3, max(map(layout.num_tiles, sizes)), 3, 32, 32)
    assert counted.num_image_tokens == list(map(layout.num_tokens, sizes))
    tokens = (given["input_ids"] == token).sum(1).tolist()
    assert tokens == [layout.num_tokens(sizes[0]) + layout.num_tokens(sizes[1]), layout.num_tokens(sizes[2])]
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**given, **options)
    for own in (loaded, auto):
        assert torch.equal(own.generate(**given, **options), expected)
