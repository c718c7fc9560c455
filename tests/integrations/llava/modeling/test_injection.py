"""Layer injection: where it is added, what it leaves alone, saved and loaded, generating, learning, and refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.generation import GenerationMixin

from integrations.llava.checkpoints.connector import load_connector, save_connector
from integrations.llava.checkpoints.model_io import load_model
from integrations.llava.config import InjectionConfig
from integrations.llava.modeling import checkpoint_activations, set_trainable
from integrations.llava.modeling.injection import decoder_layers, leading_maps
from integrations.llava.modeling.mergers import create_merger
from integrations.llava.modeling.model import FusedLlavaForConditionalGeneration
from layerfuse.testing import random_images
from tests.integrations.llava.modeling.injected_parts import IMAGE, PAIRS, TOKENS, batch, make_model, randomised
from tests.integrations.llava.tiny_parts import tiny_llm


def logits(model: FusedLlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def expected_logits(
    model: FusedLlavaForConditionalGeneration,
    plain: FusedLlavaForConditionalGeneration,
    inputs: dict[str, torch.Tensor],
) -> torch.Tensor:
    """Logits of a plain model whose decoder layers have hooks that add the mergers' tokens, row by row."""
    with torch.no_grad():
        features = model.model.vision_tower(inputs["pixel_values"])
        handles = []
        assert model.model.injection is not None
        settings = model.model.injection.settings
        for (*_, layer), tokens in zip(settings.pairs, model.model.injection(features), strict=True):
            flat = tokens.flatten(0, 1)

            def add(hidden: torch.Tensor, flat: torch.Tensor = flat) -> torch.Tensor:
                hidden = hidden.clone()
                hidden[inputs["input_ids"] == IMAGE] += flat
                return hidden

            block = decoder_layers(plain.model.language_model)[layer]
            if settings.when == "after":
                handles.append(block.register_forward_hook(lambda _, __, output, add=add: add(output)))
            else:
                handles.append(block.register_forward_pre_hook(lambda _, args, add=add: (add(args[0]), *args[1:])))
        found = logits(plain, inputs)
        for handle in handles:
            handle.remove()
    return found


FORMS: list[dict[str, Any]] = [
    {},
    {"when": "before"},
    {"pairs": ((-1, 3), (1, 0), (-1, 0)), "fuser": "mmfuser"},
    {"merger": "average"},
    {"merger": "concat", "merger_options": {"norm": "layer"}, "fuser": "select", "layers": (3,)},
    {"merger": "mmfuser", "merger_options": {"num_heads": 4}, "pairs": ((1, 3, 0), (4, 2, 3, 2))},
    {"merger": "pixel_shuffle_mlp", "merger_options": {"window": 1}},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_tokens_are_added_at_the_images_around_the_named_layers(form: dict[str, Any]) -> None:
    model = randomised(make_model(**form))
    plain = make_model((), fuser=form.get("fuser", "concat"), layers=form.get("layers", (1, 2, 3)))
    inputs = batch((1, 0, 2))
    found = logits(model, inputs)

    torch.testing.assert_close(found, expected_logits(model, plain, inputs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], logits(plain, inputs)[0], atol=1e-2)
    # Injected tokens reach text behind them only; the second prompt has none.
    torch.testing.assert_close(found[1], logits(plain, inputs)[1], atol=1e-5, rtol=1e-5)


def test_a_fuser_that_reads_the_question_is_injected_beside() -> None:
    model = randomised(make_model(fuser="text_gated"))
    inputs = batch((1, 2)) | {"condition": torch.randn(3, 32)}
    expected = expected_logits(model, make_model((), fuser="text_gated"), inputs)

    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=1e-5)
    asked = inputs | {"condition": torch.tensor([[5, 6], [7, -100], [8, 9]])}
    assert torch.equal(answer(model, asked), greedy(model, asked, 6))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("merger", ["mlp", "scalar_mix"])
def test_new_mergers_change_nothing_to_the_bit(when: str, merger: str) -> None:
    inputs = batch((1, 2))

    assert torch.equal(logits(make_model(when=when, merger=merger), inputs), logits(make_model(()), inputs))


def test_the_fuser_sees_its_own_layers_only() -> None:
    model = make_model()
    features = model.model.vision_tower(random_images(1, size=64))

    assert features.layers == (1, 2, 3, 4)
    assert leading_maps(features, 3).layers == model.model.vision_tower.backbone.layers[:3] == (1, 2, 3)
    assert model.model.fuser_grids == ((4, 4),) * 3


def test_a_saved_model_loads_with_bit_identical_logits(tmp_path: Path) -> None:
    model = randomised(make_model(((1, 4, 0),), merger="mmfuser", merger_options={"num_heads": 4}))
    model.save_pretrained(tmp_path)
    inputs = batch()
    for loaded in (AutoModelForImageTextToText.from_pretrained(tmp_path), load_model(tmp_path)):
        assert torch.equal(logits(loaded, inputs), logits(model, inputs))
        assert loaded.model.injection.settings == model.model.injection.settings  # type: ignore[union-attr]


def test_a_connector_holds_the_mergers(tmp_path: Path) -> None:
    parts = ("fuser", "projector")
    model = randomised(make_model())
    save_connector(model, parts, tmp_path / "adapter.safetensors")
    other = make_model()
    load_connector(other, parts, tmp_path / "adapter.safetensors")

    assert torch.equal(logits(other, batch()), logits(model, batch()))
    with pytest.raises(ValueError, match=r"missing|unexpected"):
        load_connector(make_model(()), parts, tmp_path / "adapter.safetensors")


def test_mergers_of_another_shape_are_drawn_anew_and_start_at_zero(tmp_path: Path) -> None:
    randomised(make_model()).save_pretrained(tmp_path)
    other = make_model(llm=tiny_llm(49, num_hidden_layers=4, hidden_size=16, intermediate_size=24)).config
    loaded = FusedLlavaForConditionalGeneration.from_pretrained(tmp_path, config=other, ignore_mismatched_sizes=True)
    for merger in loaded.model.injection.mergers:
        assert not merger.linear_2.weight.any()
        assert merger.linear_1.weight.std() > 0


def greedy(model: FusedLlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    """Answer without a cache: the whole text anew for each token."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(steps):
        found = logits(model, inputs | {"input_ids": ids, "attention_mask": mask})[:, -1]
        found[:, IMAGE] = -torch.inf
        ids = torch.cat([ids, found.argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


def answer(model: FusedLlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    found: torch.Tensor = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    return found


@pytest.mark.parametrize("when", ["before", "after"])
def test_generate_injects_in_its_first_step_and_never_again(when: str) -> None:
    model = randomised(make_model(when=when))
    inputs = batch((1, 2, 0))
    answers = answer(model, inputs)

    assert torch.equal(answers, greedy(model, inputs, 6))
    alone = batch((1,)) | {"pixel_values": inputs["pixel_values"][:1]}
    assert torch.equal(answer(model, alone)[0, -6:], answers[0, -6:])


LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 3, "n_head": 2},
    "gemma2": {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
    "gpt_neox": {"num_hidden_layers": 3, "num_attention_heads": 2},
    "opt": {"num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {"num_hidden_layers": 3, "num_attention_heads": 2},
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_other_language_models_take_it_too(kind: str, when: str) -> None:
    common = {"vocab_size": 49, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
    attention = {"attn_implementation": "eager"} if kind in ("bloom", "gemma2") else {}
    config = AutoConfig.for_model(kind, **common, **LANGUAGE_MODELS[kind])
    llm = AutoModelForCausalLM.from_config(config, **attention).eval()
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    inputs = batch((1, 2))
    plain = logits(make_model((), llm=copy.deepcopy(llm)), inputs)
    model = make_model(((1, 0), (4, 1)), llm=llm, when=when)

    assert torch.equal(logits(model, inputs), plain)
    assert not torch.allclose(logits(randomised(model), inputs), plain, atol=1e-2)
    assert torch.equal(answer(model, inputs), greedy(model, inputs, 6))


def test_beam_search_repeats_what_is_injected_with_its_prompt() -> None:
    model = randomised(make_model())
    inputs = batch((2, 1))
    together = answer(model, inputs, num_beams=3)[:, -6:]
    pixels = inputs["pixel_values"]
    first, second = (
        answer(model, batch((count,)) | {"pixel_values": own}, num_beams=3)[0, -6:]
        for count, own in ((2, pixels[:2]), (1, pixels[2:]))
    )

    assert torch.equal(together, torch.stack([first, second]))


def test_a_prompt_that_is_read_in_chunks_gives_the_same_answer() -> None:
    if not hasattr(GenerationMixin, "_supports_mm_encoder_outputs"):
        pytest.skip("this transformers reads no prompts with images in chunks")
    model = randomised(make_model())

    assert torch.equal(answer(model, batch((2,)), prefill_chunk_size=7), answer(model, batch((2,))))


def test_features_without_what_is_injected_are_refused() -> None:
    model, inputs = make_model(), batch()
    if not hasattr(GenerationMixin, "_supports_mm_encoder_outputs"):
        pytest.skip("this transformers takes no encoded images")
    plain = make_model(()).get_image_features(inputs.pop("pixel_values"))

    with pytest.raises(ValueError, match=r"have no deepstack_features.*get_image_features"):
        model(**inputs, mm_encoder_outputs={"image": plain})


def gradients(model: FusedLlavaForConditionalGeneration, *batches: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of the summed losses of several passes, of which all are forward before the first is backward."""
    set_trainable(model, ("fuser", "projector", "llm"))
    model.train()
    losses = [
        model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)).loss
        for inputs in batches
    ]
    sum(losses).backward()
    return {name: own.grad for name, own in model.named_parameters() if own.requires_grad}


@pytest.mark.parametrize("when", ["before", "after"])
def test_checkpointed_activations_give_the_same_gradients(when: str) -> None:
    first, second = batch((1, 2)), batch((1, 2))
    second["pixel_values"] = second["pixel_values"].flip(0)
    whole = randomised(make_model(when=when))
    saving = randomised(make_model(when=when))
    checkpoint_activations(saving)
    expected, found = gradients(whole, first, second), gradients(saving, first, second)

    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("counts", [(1, 1), (0, 0)], ids=["images", "text"])
def test_every_trained_parameter_has_a_gradient(counts: tuple[int, ...]) -> None:
    """So that DDP, which is told that there are no unused parameters, does not wait."""
    model = make_model(((1, 4, 0), (2, 3, 1)), merger="mmfuser", merger_options={"num_heads": 4})
    found = gradients(model, batch(counts))

    assert [name for name, gradient in found.items() if gradient is None] == []
    assert any(name.startswith("model.injection.") for name in found)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def test_mergers_learn_with_the_projector() -> None:
    counts = set_trainable(make_model(), ("projector",))
    merger = create_merger("mlp", in_channels=32, out_channels=32)
    one = sum(parameter.numel() for parameter in merger.parameters())

    assert counts["projector"]["trainable"] == (96 * 32 + 32 + 32 * 32 + 32) + len(PAIRS) * one
    assert counts["llm"]["trainable"] == 0


def test_copies_and_pickles_inject_as_well() -> None:
    model, inputs = randomised(make_model()), batch()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, inputs), logits(model, inputs))


def test_layers_keep_the_name_of_their_class() -> None:
    """Device maps and FSDP find them by it."""
    llm = tiny_llm(49, num_hidden_layers=4)
    kind = type(llm.model.layers[0])
    model = make_model(llm=llm)
    classes = {type(layer) for layer in model.model.language_model.layers}

    assert len(classes) == 1
    assert classes.pop().__name__ == kind.__name__
    assert all(isinstance(layer, kind) for layer in model.model.language_model.layers)


def test_a_language_model_that_two_models_share_is_left_as_it_was() -> None:
    llm = tiny_llm(49, num_hidden_layers=4)
    plain, inputs = make_model((), llm=llm), batch()
    expected = logits(plain, inputs)
    randomised(make_model(llm=llm))

    assert torch.equal(logits(plain, inputs), expected)


@pytest.mark.parametrize(
    "settings", [{"merger": "mlp"}, {"merger": "pixel_shuffle_mlp", "merger_options": {"window": 1}}]
)
def test_a_pass_that_failed_leaves_nothing_behind(settings: dict[str, Any]) -> None:
    model, inputs = randomised(make_model(**settings)), batch()
    expected = logits(model, inputs)
    with pytest.raises((ValueError, RuntimeError)):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:1]})
    text = batch((0, 0))

    assert torch.equal(logits(model, inputs), expected)
    torch.testing.assert_close(logits(model, text), logits(make_model(()), text))


@contextmanager
def refused(message: str) -> Iterator[None]:
    with pytest.raises(ValueError, match=message):
        yield


def test_what_cannot_be_is_refused_with_what_can() -> None:
    with refused(r"decoder layer 4, but the language model has 4, counted from 0: 0\.\.3"):
        make_model(((1, 4),))
    with refused(r"merger 'pixel_shuffle_mlp' gives 4 tokens an image, but the fuser 'concat' gives 16"):
        make_model(merger="pixel_shuffle_mlp")
    with refused(r"cannot cut a grid of 4x4 into windows of 3x3"):
        make_model(merger="pixel_shuffle_mlp", merger_options={"window": 3})
    with refused(r"window=0 .* give its edge"):
        make_model(merger="pixel_shuffle_mlp", merger_options={"window": 0})
    with refused(r"merger 'mpl' is unknown; did you mean 'mlp'\? Known: .*pixel_shuffle_mlp"):
        make_model(merger="mpl")
    with refused(r"option of merger 'mlp' 'window' is unknown"):
        make_model(merger="mlp", merger_options={"window": 2})
    with refused(r"option of merger 'pixel_shuffle_mlp' 'windw' is unknown; did you mean 'window'"):
        make_model(merger="pixel_shuffle_mlp", merger_options={"windw": 2})
    with refused(r"reads a condition, which mergers of layer injection are not given"):
        make_model(((1, 2, 3, 4, 0),), merger="text_gated", merger_options={"condition_channels": 32})
    with refused(r"merger 'mlp' takes one layer and is given 2; name a fuser as the merger"):
        make_model(((1, 2, 0),))
    with refused(r"tokens of the grid \(2, 8\) .* 'concat' of \(4, 4\) .* a merger and a fuser of one grid"):
        make_model(merger="spatial_aggregator", merger_options={"grid": [2, 8]})
    with refused(r"when is 'middle'; give one of: before, after"):
        InjectionConfig(pairs=((1, 0),), when="middle")  # type: ignore[arg-type]
    with refused(r"pairs has \[1\]; give \[layer of the backbone, decoder layer\]"):
        InjectionConfig(pairs=((1,),))
    with refused(r"pairs has \[1, -1\]"):
        InjectionConfig(pairs=((1, -1),))
    with refused(r"pairs names \[1, 0\] twice"):
        InjectionConfig(pairs=((1, 0), (1, 0)))


def test_maps_that_nobody_reads_are_refused() -> None:
    from integrations.llava.modeling.build import build_model

    model = make_model()
    backbone, fuser = model.model.vision_tower.backbone, model.model.fuser
    with refused(r"layers \(1, 2, 3, 4\) .* the first 3 .* layers \(1,\) are injected"):
        build_model(backbone, fuser, tiny_llm(49), image_token_id=IMAGE, injection=InjectionConfig(pairs=((1, 0),)))
    with refused(r"built for 3 maps"):
        build_model(backbone, fuser, tiny_llm(49), image_token_id=IMAGE, injection=InjectionConfig())


def test_image_features_come_with_what_is_injected() -> None:
    features = make_model().get_image_features(random_images(2, size=64))

    assert [[tuple(tokens.shape) for tokens in images] for images in features.deepstack_features] == [
        [(TOKENS, 32)] * 2
    ] * 3
