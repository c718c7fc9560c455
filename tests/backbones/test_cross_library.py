"""The same weights in several libraries give the same numbers at every layer, or the docs say why not."""

from __future__ import annotations

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from layerfuse.backbones import Backbone, TimmBackbone, TransformersBackbone
from layerfuse.errors import InputError
from layerfuse.testing import random_images
from tools.library_parity.architectures import ALL_LAYERS, ARCHITECTURES, FULL_SIZE, PUBLISHED, Architecture
from tools.library_parity.builders import timm_model, transformers_model
from tools.library_parity.comparison import compare_backbones, compare_features, resized
from tools.library_parity.weights import carry_weights

TOLERANCE = 1e-5
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)

# Which of them take another size as the others do: transformers resamples the rest without antialiasing.
RESAMPLED_ALIKE = {"SigLIP2 NaFlex", "DINOv2 with registers", "DINOv3", "DINOv3 H+ (SwiGLU)"}


@functools.cache
def images_of(size: tuple[int, int]) -> torch.Tensor:
    """One random image."""
    return random_images(1, size=size)


@functools.cache
def backbones_of(architecture: Architecture) -> dict[str, Backbone]:
    """Backbones that no test changes."""
    return architecture.backbones()


def largest_differences(one: Backbone, other: Backbone, size: tuple[int, int]) -> list[float]:
    """For each layer, the largest difference of a number."""
    with torch.no_grad():
        features = [backbone(images_of(size)) for backbone in (one, other)]
    return list(compare_features(*features)[0])


@every_architecture
def test_carried_weights_give_the_same_maps_and_prefix_tokens_at_every_layer(architecture: Architecture) -> None:
    backbones = backbones_of(architecture)
    agreements = compare_backbones(backbones, architecture.size)
    assert len(agreements) == {2: 1, 3: 3}[len(backbones)]
    for agreement in agreements:
        assert len(agreement.absolute) == len(ALL_LAYERS) == 5
        assert max(agreement.absolute) <= TOLERANCE, agreement


@every_architecture
def test_every_weight_counts_in_the_comparison(architecture: Architecture) -> None:
    """Where one weight differs, the maps do: none is compared against a value that has no effect."""
    *_, (library, backbone) = backbones_of(architecture).items()
    changed = copy.deepcopy(backbone)
    blocks = [re.escape(name) for name, module in changed.model.named_modules() if module in changed.blocks]
    others = re.compile("|".join(f"{block}\\." for block in (blocks[0], *blocks[2:])))
    # A constant that is added to all keys shifts all logits of a query alike.
    without_effect = re.compile(r"\.(k_proj|key)\.bias$") if library == "transformers" else re.compile("^$")
    unseen, tried = [], 0
    for name, weight in changed.model.named_parameters():
        if others.match(name) or without_effect.search(name) or not weight.numel():
            continue
        before = weight.detach().clone()
        with torch.no_grad():
            weight.add_(0.05 * torch.randn_like(weight))
        tried += 1
        if max(largest_differences(backbone, changed, architecture.size)) < 20 * TOLERANCE:
            unseen.append(name)
        with torch.no_grad():
            weight.copy_(before)
    assert unseen == []
    assert tried > 10


@every_architecture
def test_layers_that_were_swapped_or_lack_a_norm_are_seen(architecture: Architecture) -> None:
    *_, (_, backbone) = backbones_of(architecture).items()
    changed = copy.deepcopy(backbone)
    first, second = changed.blocks[1], changed.blocks[2]
    weights = copy.deepcopy((first.state_dict(), second.state_dict()))
    first.load_state_dict(weights[1])
    second.load_state_dict(weights[0])
    differences = largest_differences(backbone, changed, architecture.size)
    assert max(differences[:2]) == 0
    assert min(differences[2:]) > 1000 * TOLERANCE
    first.load_state_dict(weights[0])
    second.load_state_dict(weights[1])

    norms = {
        name: module
        for name, module in first.named_modules()
        if "norm" in type(module).__name__.lower() and not list(module.children())
    }
    assert len(norms) >= 2
    for name, norm in norms.items():
        first.set_submodule(name, nn.Identity())
        assert min(largest_differences(backbone, changed, architecture.size)[2:]) > 100 * TOLERANCE, name
        first.set_submodule(name, norm)
    assert max(largest_differences(backbone, changed, architecture.size)) == 0


@pytest.mark.filterwarnings("ignore::UserWarning:timm")  # of its resampling of BEiT's position biases
@pytest.mark.parametrize("architecture", [one for one in ARCHITECTURES if one.other_sizes], ids=str)
def test_other_sizes_agree_or_differ_by_what_the_docs_say(architecture: Architecture) -> None:
    for size in architecture.other_sizes:
        agreements = compare_backbones(resized(architecture.backbones(), size), size)
        for agreement in agreements:
            if architecture.name in RESAMPLED_ALIKE or "transformers" not in agreement.libraries:
                assert max(agreement.absolute) <= TOLERANCE, agreement
            else:
                assert 1e-4 < max(agreement.relative) < 0.03, agreement


def test_only_the_resampling_of_position_embeddings_differs_at_another_size() -> None:
    clip = ARCHITECTURES[0]
    resampled = resized(clip.backbones(), (98, 98))["timm"]
    options = {"hidden_act": "quick_gelu", "image_size": 98, "patch_size": 14}
    other = TransformersBackbone(transformers_model("clip_vision_model", **options)(), layers=ALL_LAYERS).eval()
    carry_weights(resampled.model, other.model)
    assert max(largest_differences(resampled, other, (98, 98))) <= TOLERANCE


def test_published_configs_differ_by_what_the_docs_say() -> None:
    bounds = {"SigLIP": (1e-5, 1e-3), "ViT": (1e-6, 1e-4), "BEiT": (1e-6, 1e-4)}
    for architecture in PUBLISHED:
        for agreement in compare_backbones(architecture.backbones(), architecture.size):
            least, most = bounds[architecture.name] if "transformers" in agreement.libraries else (-1.0, 1e-9)
            assert least < max(agreement.relative) < most, (architecture.name, agreement)


def test_the_table_in_the_docs_is_this_one(root: Path) -> None:
    text = (root / "docs" / "backbones.md").read_text(encoding="utf-8")
    section = text.partition("## Same weights, other library")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (\d+) \| (\S+) \| (\S+) \|$", section, re.MULTILINE)
    layers = {2: "5", 3: "15"}
    expected = [(one.name, ", ".join(one.models), layers[len(one.models)]) for one in ARCHITECTURES]
    assert [row[:3] for row in rows] == expected
    assert all(float(number) <= TOLERANCE for row in rows for number in row[3:])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FULL_SIZE, ids=str)
def test_libraries_agree_at_full_width(architecture: Architecture) -> None:
    for agreement in compare_backbones(architecture.backbones(), architecture.size, num_images=1):
        assert max(agreement.absolute) <= TOLERANCE, agreement


def test_weights_without_a_counterpart_are_named() -> None:
    one = TimmBackbone(timm_model("vit_base_patch16_224", img_size=32)(), layers=-1)
    other = TransformersBackbone(transformers_model("ijepa", image_size=32, patch_size=16)(), layers=-1)
    with pytest.raises(InputError, match=r"not wanted: cls_token"):
        carry_weights(one.model, other.model)
    one = TimmBackbone(timm_model("vit_huge_patch14_gap_224", img_size=28)(), layers=-1)
    other = TransformersBackbone(transformers_model("dinov2", image_size=28, patch_size=14)(), layers=-1)
    with pytest.raises(InputError, match=r"weights that were not found: embeddings.cls_token"):
        carry_weights(one.model, other.model)
