"""The model: saved and loaded exactly, generating, with every backbone family; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, GenerationConfig, Trainer, TrainingArguments

import integrations.llava
from integrations.llava.checkpoints.connector import load_connector, save_connector
from integrations.llava.checkpoints.model_io import load_model
from integrations.llava.modeling import set_trainable
from integrations.llava.modeling.build import build_model, checkpoint_activations
from integrations.llava.modeling.model import FusedLlavaForConditionalGeneration
from layerfuse.backbones import create_backbone
from layerfuse.fusers import ExtraTokens, create_fuser
from layerfuse.testing import random_images, randomise_parameters
from tests.integrations.llava.tiny_parts import tiny_llm

VOCABULARY, IMAGE = 50, 49
TINY_VIT = {"embed_dim": 32, "depth": 4, "num_heads": 2}
BACKBONES = {
    "timm CLIP": ("timm", "vit_base_patch16_clip_quickgelu_224", TINY_VIT),
    "timm EVA02": ("timm", "eva02_base_patch14_224", TINY_VIT),
    "timm DINOv3": ("timm", "vit_small_patch16_dinov3", TINY_VIT),
}


def make_model(
    family: str, name: str, options: dict[str, int], *, fuser: str = "mmfuser"
) -> FusedLlavaForConditionalGeneration:
    torch.manual_seed(0)
    size = None if family == "transformers" else 4 * (14 if "patch14" in name else 16)
    pretrained = family == "transformers"
    backbone = create_backbone(
        f"{family}:{name}", layers=(1, 2, 3), pretrained=pretrained, image_size=size, options=options
    )
    heads = {"num_heads": 4} if fuser == "mmfuser" else {}
    fuser_module = create_fuser(fuser, in_channels=32, num_layers=3, options=heads)
    model = build_model(backbone, fuser_module, tiny_llm(VOCABULARY - 1), image_token_id=IMAGE)
    randomise_parameters(model.model.fuser)
    return model.eval()


@pytest.fixture(params=[*BACKBONES, "transformers CLIP"])
def model(request: pytest.FixtureRequest, backbone_folder: Path) -> FusedLlavaForConditionalGeneration:
    if request.param in BACKBONES:
        return make_model(*BACKBONES[request.param])
    return make_model("transformers", str(backbone_folder), {})


def inputs(model: FusedLlavaForConditionalGeneration, num_images: int = 2) -> dict[str, torch.Tensor]:
    tokens = [IMAGE] * model.config.image_seq_length
    ids = torch.tensor([[1, *tokens, 5, 6, 7, 8]] * num_images)
    size = tuple(model.config.vision_config.image_size)
    return {
        "input_ids": ids,
        "pixel_values": random_images(num_images, size=size),
        "attention_mask": torch.ones_like(ids),
    }


def labels(model: FusedLlavaForConditionalGeneration) -> torch.Tensor:
    ids = inputs(model)["input_ids"]
    return ids.masked_fill(ids == IMAGE, -100)


def test_a_saved_model_loads_with_bit_identical_logits(
    model: FusedLlavaForConditionalGeneration, tmp_path: Path
) -> None:
    batch = inputs(model)
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    for loaded in (AutoModelForImageTextToText.from_pretrained(tmp_path), load_model(tmp_path)):
        assert isinstance(loaded, FusedLlavaForConditionalGeneration)
        with torch.no_grad():
            assert torch.equal(loaded(**batch).logits, expected)


def test_vision_loaded_in_bfloat16_equals_vision_converted(
    model: FusedLlavaForConditionalGeneration, tmp_path: Path
) -> None:
    pixels = inputs(model)["pixel_values"]
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model.to(torch.bfloat16).get_image_features(pixels).last_hidden_state
        assert torch.equal(loaded.get_image_features(pixels).last_hidden_state, expected)


def test_images_change_the_logits_only_behind_them(model: FusedLlavaForConditionalGeneration) -> None:
    batch = inputs(model)
    with torch.no_grad():
        first = model(**batch).logits
        second = model(**batch | {"pixel_values": batch["pixel_values"] + 1}).logits

    assert torch.equal(first[:, 0], second[:, 0])
    assert not torch.allclose(first[:, -1], second[:, -1])


@pytest.fixture
def small() -> FusedLlavaForConditionalGeneration:
    return make_model(*BACKBONES["timm CLIP"])


def test_number_of_image_tokens_is_the_fusers(small: FusedLlavaForConditionalGeneration) -> None:
    assert (
        small.config.image_seq_length == small.config.layout.num_tokens() == small.model.fuser.num_tokens([(4, 4)] * 3)
    )
    assert small.config.layout.num_tokens() == 16
    assert small.get_image_features(random_images(3, size=64)).pooler_output[0].shape == (16, 32)


def test_tokens_that_belong_to_no_cell_are_counted(
    small: FusedLlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuser = create_fuser("average", in_channels=32, num_layers=3)
    monkeypatch.setattr(fuser, "extra_tokens", lambda _: ExtraTokens(front=1, behind=2))
    model = build_model(small.model.vision_tower.backbone, fuser, tiny_llm(VOCABULARY), image_token_id=IMAGE)

    assert model.config.layout.num_tokens() == model.config.image_seq_length == 16 + 1 + 2


def test_another_number_of_image_tokens_is_an_error(small: FusedLlavaForConditionalGeneration) -> None:
    batch = inputs(small)

    with pytest.raises((ValueError, RuntimeError), match="Image features and image tokens do not match"):
        small(**batch | {"pixel_values": batch["pixel_values"][:1]})


def test_the_image_token_is_never_chosen_however_likely_it_is(
    small: FusedLlavaForConditionalGeneration, tmp_path: Path
) -> None:
    """Also by a model that 0.1 saved, whose generation config bans nothing."""
    with torch.no_grad():
        small.lm_head.weight[IMAGE] = 100 * small.model(**inputs(small)).last_hidden_state[:, -1].sum(0)
    small.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    saved = json.loads(file.read_text())
    assert saved.pop("suppress_tokens") == [IMAGE]
    file.write_text(json.dumps(saved))
    for model in (small, load_model(tmp_path)):
        batch = inputs(model)
        assert (model(**batch).logits[:, -1].argmax(-1) == IMAGE).all()
        own = GenerationConfig(do_sample=True, max_new_tokens=2, pad_token_id=0)
        for options in ({"max_new_tokens": 2}, {"max_new_tokens": 2, "num_beams": 2}, {"generation_config": own}):
            ids = model.generate(**batch, **options)
            assert not (ids[:, batch["input_ids"].shape[1] :] == IMAGE).any()


def test_the_loss_is_over_the_language_models_own_vocabulary(small: FusedLlavaForConditionalGeneration) -> None:
    batch = inputs(small)
    out = small(**batch, labels=labels(small))
    own = out.logits[:, :-1, :IMAGE].reshape(-1, IMAGE)
    expected = torch.nn.functional.cross_entropy(own, labels(small)[:, 1:].reshape(-1))

    torch.testing.assert_close(out.loss, expected)
    assert torch.equal(out.logits, small(**batch).logits)


def test_labels_that_hold_image_tokens_give_a_finite_loss(small: FusedLlavaForConditionalGeneration) -> None:
    batch = inputs(small)
    out = small(**batch, labels=batch["input_ids"])
    images = batch["input_ids"][:, 1:] == IMAGE
    logits = out.logits[:, :-1].clone()
    logits[..., IMAGE].masked_fill_(~images, -torch.inf)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    torch.testing.assert_close(out.loss, expected)
    small.train()
    small(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in small.parameters() if p.grad is not None)


def test_the_stock_trainer_logs_finite_losses_with_smoothed_labels(
    small: FusedLlavaForConditionalGeneration, tmp_path: Path
) -> None:
    batch = {**inputs(small), "labels": inputs(small)["input_ids"]}
    rows = [{name: tensor[0] for name, tensor in batch.items()}] * 2
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        label_smoothing_factor=0.1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = Trainer(model=small, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()

    assert 0 < trainer.state.log_history[0]["loss"] < 100
    assert 0 < trainer.evaluate()["eval_loss"] < 100


def test_resized_embeddings_change_no_logit_and_survive_saving(
    small: FusedLlavaForConditionalGeneration, tmp_path: Path
) -> None:
    batch = inputs(small)
    before = small(**batch).logits
    small.resize_token_embeddings(VOCABULARY + 7)
    small.save_pretrained(tmp_path)
    after, loaded = small(**batch).logits, load_model(tmp_path)(**batch).logits

    assert after.shape[-1] == VOCABULARY + 7
    assert torch.equal(after[..., :VOCABULARY], before) and torch.equal(loaded, after)


def test_generation_with_cache_equals_generation_without(small: FusedLlavaForConditionalGeneration) -> None:
    batch = inputs(small)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": VOCABULARY}

    assert torch.equal(small.generate(**batch, **options), small.generate(**batch, **options, use_cache=False))


def test_a_frozen_backbone_keeps_no_graph_and_stays_in_evaluation_mode(
    small: FusedLlavaForConditionalGeneration,
) -> None:
    set_trainable(small, ("fuser", "projector"))
    small.train()
    maps: list[torch.Tensor] = []
    handle = small.model.vision_tower.register_forward_hook(lambda *arguments: maps.extend(arguments[2].maps))
    small(**inputs(small), labels=labels(small)).loss.backward()
    handle.remove()

    assert not any(feature.requires_grad for feature in maps)
    assert not small.model.vision_tower.training and small.model.fuser.training
    assert all(parameter.grad is not None for parameter in small.model.fuser.parameters())


def test_activation_checkpointing_changes_no_gradient(small: FusedLlavaForConditionalGeneration) -> None:
    """Selective checkpointing computes no matrix product again."""
    set_trainable(small, ("fuser", "projector", "llm"))
    small.train()
    gradients, products = [], []
    for selective in (None, False, True):
        if selective is not None:
            checkpoint_activations(small, selective=selective)
        small.zero_grad()
        with FlopCounterMode(display=False) as counter:
            small(**inputs(small), labels=labels(small)).loss.backward()
        products.append(counter.get_total_flops())
        gradients.append({name: p.grad.clone() for name, p in small.named_parameters() if p.grad is not None})

    assert products[0] == products[2] < products[1]
    for others in gradients[1:]:
        assert gradients[0].keys() == others.keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(others[name], gradient, rtol=1e-6, atol=1e-8)


def test_compiled_without_graph_breaks_gives_the_same_logits(small: FusedLlavaForConditionalGeneration) -> None:
    # The check that transformers' own LLaVA makes in front of masked_scatter is beyond torch 2.11.
    fullgraph = Version(torch.__version__) >= Version("2.12")
    batch = inputs(small)
    with torch.no_grad():
        expected = small(**batch).logits
        compiled = torch.compile(small, fullgraph=fullgraph, backend="eager")(**batch).logits

    torch.testing.assert_close(compiled, expected)


def test_a_trainable_backbone_gets_gradients(small: FusedLlavaForConditionalGeneration) -> None:
    set_trainable(small, ("backbone", "fuser", "projector"))
    small.train()
    small(**inputs(small), labels=labels(small)).loss.backward()

    assert small.model.vision_tower.training
    assert all(parameter.grad is not None for parameter in small.model.vision_tower.parameters())


def test_a_batch_without_images_gives_fuser_and_projector_zero_gradients(
    small: FusedLlavaForConditionalGeneration,
) -> None:
    set_trainable(small, ("fuser", "projector", "llm"))
    ids = torch.tensor([[1, 5, 6, 7]])
    expected = small(input_ids=ids, labels=ids).loss
    small.train()
    loss = small(input_ids=ids, labels=ids).loss
    loss.backward()

    assert torch.equal(loss, expected)
    for part in (small.model.fuser, small.model.multi_modal_projector):
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in part.parameters())


def test_building_draws_no_parameter_anew() -> None:
    torch.manual_seed(0)
    backbone = create_backbone(
        f"timm:{BACKBONES['timm CLIP'][1]}", layers=(1, 2), pretrained=False, image_size=64, options=TINY_VIT
    )
    fuser = create_fuser("mmfuser", in_channels=32, num_layers=2, options={"num_heads": 4})
    llm = tiny_llm(VOCABULARY)
    before = {
        prefix: {name: tensor.clone() for name, tensor in module.state_dict().items()}
        for prefix, module in {"vision_tower.backbone": backbone, "fuser": fuser, "language_model": llm.model}.items()
    }
    model = build_model(backbone, fuser, llm, image_token_id=IMAGE)

    for prefix, tensors in before.items():
        module = model.model.get_submodule(prefix)
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, tensors[name]), f"{prefix}.{name}"
    assert torch.equal(model.lm_head.weight, llm.lm_head.weight)


def test_a_fuser_for_other_layers_is_refused() -> None:
    backbone = create_backbone(
        f"timm:{BACKBONES['timm CLIP'][1]}", layers=(1, 2), pretrained=False, image_size=64, options=TINY_VIT
    )
    fuser = create_fuser("average", in_channels=32, num_layers=3)

    with pytest.raises(ValueError, match=r"fuser 'average' was built for 3 maps of widths .* num_layers=2"):
        build_model(backbone, fuser, tiny_llm(9), image_token_id=9)


def test_weights_that_do_not_cover_the_model_are_listed_key_by_key(
    small: FusedLlavaForConditionalGeneration, tmp_path: Path
) -> None:
    small.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    missing = ["model.multi_modal_projector.linear_1.weight", next(name for name in weights if ".fuser." in name)]
    changed = {name: tensor for name, tensor in weights.items() if name not in missing} | {
        "model.odd.weight": torch.ones(2)
    }
    save_file(changed, file, metadata={"format": "pt"})

    for load in (load_model, integrations.llava.load_model, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(ValueError, match="do not fit the model its config describes") as error:
            load(tmp_path)
        for name in (*missing, "model.odd.weight"):
            assert name in str(error.value)


def test_a_folder_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config.json"):
        load_model(tmp_path)


def test_a_model_of_another_kind_is_refused(llm_folder: Path) -> None:
    with pytest.raises(ValueError, match="holds a 'llama' model of .*, which is none of layerfuse, mmfuser"):
        load_model(llm_folder)


def test_an_adapter_holds_fuser_and_projector_exactly(
    small: FusedLlavaForConditionalGeneration, tmp_path: Path
) -> None:
    path = save_connector(small, ("fuser", "projector"), tmp_path / "stage" / "adapter.safetensors")
    expected = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    assert set(load_file(path)) == {name for name in expected if ".fuser." in name or "projector" in name}
    randomise_parameters(small.model.fuser, seed=1)
    randomise_parameters(small.model.multi_modal_projector, seed=1)
    load_connector(small, ("fuser", "projector"), path)

    assert all(torch.equal(tensor, expected[name]) for name, tensor in small.state_dict().items())


def test_an_adapter_that_does_not_fit_is_refused(small: FusedLlavaForConditionalGeneration, tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(FileNotFoundError, match="run the stage that writes it"):
        load_connector(small, ("fuser",), path)
    path.write_bytes(b"not a safetensors file at all")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_connector(small, ("fuser",), path)
    save_connector(small, ("projector",), path)
    with pytest.raises(ValueError, match=r"Missing: model.fuser.*unexpected: model.multi_modal_projector"):
        load_connector(small, ("fuser",), path)
    save_file({"model.multi_modal_projector.linear_1.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"of another shape: model.multi_modal_projector.linear_1.weight"):
        load_connector(small, ("projector",), path)
