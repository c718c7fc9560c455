"""`text_gated` in LLaVA: what an image's condition is, that it arrives, and that a chat never changes it again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from integrations.llava.config.schema import Recipe
from integrations.llava.config.yaml_io import load_recipe
from integrations.llava.data import Collator, ConversationDataset
from integrations.llava.image_layout import FixedLayout
from integrations.llava.inference.predictor import Predictor, load_predictor
from integrations.llava.inference.sampling import SamplingParams
from integrations.llava.modeling import FusedLlavaForConditionalGeneration
from integrations.llava.prompts import IGNORE_INDEX, TEMPLATES, TextEncoder, asked_ids
from layerfuse.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from tests.integrations.llava.inference.answering_parts import PROMPTS, SAMPLED, save_run
from tests.integrations.llava.tiny_parts import human_and_gpt, make_tokenizer, tiny_overrides

WIDTH = 32
CHAT = human_and_gpt("<image>\nWhat number is it?", "One.", "And this <image>?", "Two.", "Sure?")


@pytest.fixture(scope="module")
def gated_run(backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose fuser reads questions."""
    options = {"condition_channels": WIDTH}
    folder = tmp_path_factory.mktemp("gated") / "tiny"
    return save_run(folder, backbone_folder, width=WIDTH, fuser="text_gated", fuser_options=options)


@pytest.fixture(scope="module")
def gated(gated_run: Path) -> Predictor:
    """That model, loaded, with a gate that was drawn so that questions make a difference."""
    predictor = load_predictor(gated_run)
    fuser = predictor.model.model.fuser
    torch.manual_seed(0)
    fuser.reset_parameters()
    torch.nn.init.normal_(fuser.condition_proj.weight)
    torch.nn.init.normal_(fuser.weight_head.weight)
    return predictor


@pytest.fixture
def encode() -> Callable[..., list[int]]:
    """A text as the human's words are tokenised."""
    encoder = TextEncoder(make_tokenizer("llama"))
    return lambda *texts: [token for text in texts for token in encoder(text, at_start=True)]


# Which words


def test_in_training_every_image_goes_with_all_of_the_humans_words(encode: Any) -> None:
    encoder = TextEncoder(make_tokenizer("llama"))
    ids = asked_ids(CHAT, 2, encoder=encoder, until_shown=False)

    assert ids == [encode("What number is it?", "And this ?", "Sure?")] * 2


def test_in_a_chat_an_image_goes_with_the_turns_up_to_its_own(encode: Any) -> None:
    encoder = TextEncoder(make_tokenizer("llama"))
    ids = asked_ids(CHAT, 2, encoder=encoder, until_shown=True)

    assert ids == [encode("What number is it?"), encode("What number is it?", "And this ?")]
    assert asked_ids(CHAT[:1], 1, encoder=encoder, until_shown=True) == ids[:1]
    assert asked_ids(CHAT[:3], 2, encoder=encoder, until_shown=True) == ids


def test_images_without_tags_stand_in_the_first_turn(encode: Any) -> None:
    encoder = TextEncoder(make_tokenizer("llama"))
    turns = human_and_gpt("What?", "One.", "Sure?")

    assert asked_ids(turns, 2, encoder=encoder, until_shown=True) == [encode("What?")] * 2
    assert asked_ids(turns, 0, encoder=encoder, until_shown=True) == []


def test_several_tags_of_one_image_are_one(encode: Any) -> None:
    encoder = TextEncoder(make_tokenizer("llama"))
    turns = human_and_gpt("<image> What <image>?")

    assert asked_ids(turns, 1, encoder=encoder, until_shown=True) == [encode("What ?")]
    assert asked_ids(human_and_gpt("<image>"), 1, encoder=encoder, until_shown=True) == [[]]


def test_a_batch_has_one_row_per_image(data_folder: Path, encode: Any) -> None:
    samples = [
        {"image": ["0.png", "1.png"], "conversations": CHAT[:4]},
        {"conversations": human_and_gpt("What is one?", "A number.")},
        {"image": "2.png", "conversations": human_and_gpt("<image>\nWhat?", "Two.")},
        {"image": "missing.png", "conversations": human_and_gpt("<image>\nWhat?", "Two.")},
    ]
    dataset = ConversationDataset(
        samples,
        image_folder=data_folder,
        template=TEMPLATES["v1"],
        encoder=TextEncoder(make_tokenizer("llama")),
        preprocessing=Preprocessing(size=(32, 32), mean=CLIP_MEAN, std=CLIP_STD, mode="pad"),
        layout=FixedLayout(999, 5),
        bad_samples="skip",
        with_condition=True,
    )
    batch = Collator(0)([dataset[index] for index in range(4)])
    asked = [encode("What number is it?", "And this ?")] * 2 + [encode("What?")]

    assert len(batch["pixel_values"]) == len(batch["condition"]) == 3
    assert [[token for token in row if token != IGNORE_INDEX] for row in batch["condition"].tolist()] == asked
    assert "condition" not in Collator(0)([dataset[1]])


# What the fuser is told


def test_the_condition_is_the_mean_embedding_and_gives_no_gradient(gated: Predictor) -> None:
    inner = gated.model.model
    pixels = torch.randn(2, 3, 32, 32)
    ids = torch.tensor([[5, 6, 7], [8, IGNORE_INDEX, IGNORE_INDEX]])
    table = inner.get_input_embeddings().weight
    vectors = torch.stack([table[[5, 6, 7]].mean(0), table[8]])
    of_ids = inner.get_image_features(pixels, condition=ids).pooler_output
    of_vectors = inner.get_image_features(pixels, condition=vectors.detach()).pooler_output

    torch.testing.assert_close(of_ids, of_vectors)
    (gradient,) = torch.autograd.grad(torch.stack(of_ids).sum(), table, allow_unused=True)
    assert gradient is None


def test_images_are_spliced_in_as_without_a_condition(gated: Predictor, pictures: list[Image.Image]) -> None:
    model = gated.model
    batch = gated.collate([gated.prepare(pictures[:2], CHAT), gated.prepare(pictures[2], "What?")])
    features = model.model.get_image_features(batch["pixel_values"], condition=batch["condition"]).pooler_output
    embeds = model.get_input_embeddings()(batch["input_ids"])
    embeds[batch["input_ids"] == model.config.image_token_index] = torch.cat(features)
    expected = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"]).logits

    torch.testing.assert_close(model(**batch).logits, expected)


def test_without_a_condition_the_model_says_what_is_missing(gated: Predictor) -> None:
    pixels = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"'text_gated' reads what is asked .* or vectors, \(images, 32\)"):
        gated.model.model.get_image_features(pixels)


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        (
            torch.ones(1, 32, dtype=torch.bool),
            r"condition has shape \(1, 32\) and dtype torch.bool; give the token ids",
        ),
        (torch.tensor([5, 6]), r"condition has shape \(2,\) and dtype torch.int64; give the token ids"),
        ([[5, 6]], "condition is a list; give the token ids"),
        (torch.tensor([[5, 10**6], [-7, IGNORE_INDEX]]), r"token ids from -7 to 1000000; .* knows 0 to \d+\. Give ids"),
        (torch.tensor([[5, -7]]), r"token ids from -7 to 5; .* filled up with -100"),
    ],
)
def test_a_condition_that_cannot_be_read_is_refused(gated: Predictor, condition: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        gated.model.model.get_image_features(torch.zeros(1, 3, 32, 32), condition=condition)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_whole_dtype_are_the_same_ids(gated: Predictor, dtype: torch.dtype) -> None:
    inner, pixels, ids = gated.model.model, torch.randn(1, 3, 32, 32), torch.tensor([[5, 6, 7]])
    expected = inner.get_image_features(pixels, condition=ids).last_hidden_state
    assert torch.equal(inner.get_image_features(pixels, condition=ids.to(dtype)).last_hidden_state, expected)


def test_a_condition_for_a_fuser_that_takes_none_is_refused(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="fuser 'mmfuser' takes no condition"):
        predictor.model.model.get_image_features(torch.zeros(1, 3, 32, 32), condition=torch.zeros(1, 32))
    assert "condition" not in predictor.prepare(Image.new("RGB", (32, 32)), "What?")


def test_at_the_start_every_condition_answers_alike(backbone_folder: Path, pictures: list[Image.Image]) -> None:
    model, batch = _fresh(backbone_folder), torch.randn(2, 3, 32, 32)
    neutral = model.model.get_image_features(batch, condition=torch.zeros(2, WIDTH)).last_hidden_state
    asked = model.model.get_image_features(batch, condition=torch.tensor([[5, 6], [7, 8]])).last_hidden_state

    assert torch.equal(neutral, asked)


def _fresh(backbone_folder: Path) -> FusedLlavaForConditionalGeneration:
    from integrations.llava.modeling import build_model
    from layerfuse import create_backbone, create_fuser
    from tests.integrations.llava.tiny_parts import tiny_llm

    backbone = create_backbone(f"transformers:{backbone_folder}", layers=(1, 2, 3, 4))
    fuser = create_fuser(
        "text_gated", in_channels=backbone.embed_dim, num_layers=4, options={"condition_channels": WIDTH}
    )
    return build_model(backbone, fuser, tiny_llm(400), image_token_id=399)


# Answers


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(max_new_tokens=12), SamplingParams(max_new_tokens=8, num_beams=3), SAMPLED],
    ids=["greedy", "beams", "sampled"],
)
def test_answers_do_not_depend_on_the_batch_size(
    gated: Predictor, mixture: list[Any], sampling: SamplingParams
) -> None:
    one, eight = (gated(mixture, PROMPTS, batch_size=size, sampling=sampling) for size in (1, 8))

    assert one == eight
    assert len(set(one)) > 3


def test_beams_see_the_condition_of_their_own_prompts_images(gated: Predictor, mixture: list[Any]) -> None:
    batch = gated.collate([gated.prepare(images, text) for images, text in zip(mixture, PROMPTS, strict=True)])
    seen: list[torch.Tensor] = []
    hook = gated.model.model.language_model.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    for beams in (1, 2):
        gated.answer_batch(batch, [""] * 8, SamplingParams(max_new_tokens=1, num_beams=beams))
    hook.remove()

    torch.testing.assert_close(seen[1], seen[0].repeat_interleave(2, 0), atol=1e-4, rtol=0)


def test_later_turns_of_a_chat_leave_the_tokens_of_an_image_as_they_were(
    gated: Predictor, pictures: list[Image.Image]
) -> None:
    def tokens(messages: list[dict[str, str]], count: int) -> torch.Tensor:
        batch = gated.collate([gated.prepare(pictures[:count], messages)])
        output = gated.model.model.get_image_features(batch["pixel_values"], condition=batch["condition"])
        return output.last_hidden_state

    with torch.inference_mode():
        first, second, third = (tokens(CHAT[:end], count) for end, count in ((1, 1), (3, 2), (5, 2)))

    torch.testing.assert_close(first, second[:1])
    torch.testing.assert_close(second, third)
    with torch.inference_mode():
        other = tokens(human_and_gpt("<image>\nIs it a wall?"), 1)
    assert (first - other).abs().max() > 0.01  # the question does matter


# From a recipe


@pytest.fixture(scope="module")
def gated_recipe(backbone_folder: Path, llm_folder: Path, data_folder: Path) -> Recipe:
    """MMFuser's recipe with `text_gated` on all blocks but the last."""
    overrides = tiny_overrides(backbone_folder, llm_folder, data_folder) | {
        "model.layers": [1, 2, 3, 4],
        "model.fuser": "text_gated",
        "model.fuser_options": {"groups": 2},
        "pretrain.gradient_checkpointing": False,
        "finetune.gradient_checkpointing": True,
    }
    return load_recipe("mmfuser_7b", overrides)


def test_a_dry_run_knows_the_gated_model(gated_recipe: Recipe) -> None:
    from integrations.llava.dry_run.facts import build_on_meta, model_facts
    from integrations.llava.modeling import RecipeParts

    model = build_on_meta(RecipeParts(gated_recipe.model, offline=True), gated_recipe.pretrain)
    assert model_facts(model).connector_bytes > 0


def test_another_width_than_the_language_models_is_refused(gated_recipe: Recipe, tmp_path: Path) -> None:
    from integrations.llava.modeling import assemble

    gated_recipe.model.fuser_options["condition_channels"] = 5
    try:
        with pytest.raises(ValueError, match="sets condition_channels to 5, .* have 32 numbers; leave"):
            assemble(gated_recipe.model)
    finally:
        del gated_recipe.model.fuser_options["condition_channels"]
