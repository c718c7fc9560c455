"""Parity of layer injection with transformers' own models: hidden states around every decoder layer, and logits.

The backbones of these models read their images in other ways than ours, so theirs run, and ours gets their maps
(Qwen3-VL), or ours is theirs (Granite 4 Vision, whose packing of tiles is left out: one image of one size).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from einops import rearrange
from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM, Qwen3Config, Qwen3ForCausalLM

from integrations.llava.config import InjectionConfig
from integrations.llava.modeling.build import build_model
from integrations.llava.modeling.injection import decoder_layers
from layerfuse.backbones import create_backbone
from layerfuse.features import FeatureMaps, Grid
from layerfuse.fusers import Fuser
from tests.integrations.llava.tiny_parts import tiny_clip

VOCABULARY, IMAGE, TOKENS = 50, 40, 4
IDS = torch.tensor([[0, 0, 0, 0, 5, *[IMAGE] * TOKENS, 6, 7], [1, *[IMAGE] * TOKENS, 8, *[IMAGE] * TOKENS, 9]])
MASK = (IDS != 0).long()
INPUTS = {"input_ids": IDS, "attention_mask": MASK, "position_ids": torch.arange(IDS.shape[1]).expand(2, -1)}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def theirs(name: str) -> Any:
    found = getattr(transformers, name, None)
    if found is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return found


class Shuffled(Fuser):
    """Qwen3-VL's main merger up to its linear layers: LayerNorm over C, then windows of 2x2 on the channels."""

    name = "shuffled"

    def __init__(self, in_channels: int | Sequence[int], num_layers: int) -> None:
        super().__init__(in_channels, num_layers, out_channels=4 * (in_channels if isinstance(in_channels, int) else 1))
        self.norm = nn.LayerNorm(self.in_channels[-1], eps=1e-6)

    def fuse(self, features: FeatureMaps, *, condition: torch.Tensor | None = None) -> torch.Tensor:
        height = features.grids[-1][0]
        return rearrange(self.norm(features[-1]), "b (h p w q) c -> b (h w) (p q c)", h=height // 2, p=2, q=2)

    def out_grid(self, grids: Sequence[Grid]) -> Grid:
        return grids[-1][0] // 2, grids[-1][1] // 2


def randomise(model: nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)


@dataclass
class Seen:
    """What every decoder layer, and the norm behind the last, read; and the logits."""

    hidden: list[torch.Tensor]
    logits: torch.Tensor


@torch.no_grad()
def run(model: Any, **inputs: torch.Tensor) -> Seen:
    language_model = model.model.language_model
    hidden: list[torch.Tensor] = []
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: hidden.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for module in (*decoder_layers(language_model), language_model.norm)
    ]
    logits = model(**INPUTS, **inputs).logits
    for handle in handles:
        handle.remove()
    return Seen(hidden, logits)


def assert_equal(ours: Seen, reference: Seen) -> None:
    """Compare where there is text or an image; padding is nobody's."""
    real = MASK.bool()
    assert len(ours.hidden) == len(reference.hidden)
    for index, (found, expected) in enumerate(zip(ours.hidden, reference.hidden, strict=True)):
        torch.testing.assert_close(found[real], expected[real], **TOLERANCE, msg=f"input of layer {index}")
    torch.testing.assert_close(ours.logits[real], reference.logits[real], **TOLERANCE)


def copy_linears(source: Any, target: Any, *names: tuple[str, str]) -> None:
    for own, other in names:
        getattr(target, own).load_state_dict(getattr(source, other).state_dict())


def test_parity_with_qwen3_vl() -> None:
    vision = {
        "depth": 4,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "num_position_embeddings": 16,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0, 1, 2],
    }
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = theirs("Qwen3VLConfig")(
        vision_config=vision,
        text_config=text | {"rope_parameters": rope | {"mrope_section": [6, 5, 5]}},
        image_token_id=IMAGE,
        video_token_id=41,
        vision_start_token_id=42,
        vision_end_token_id=43,
    )
    reference = theirs("Qwen3VLForConditionalGeneration")(config).eval()
    randomise(reference)
    visual, maps = reference.model.visual, []
    for block in visual.blocks:
        block.register_forward_hook(lambda _, __, output: maps.append(output))
    patches, grids = torch.randn(3 * 16, 3 * 2 * 4 * 4), torch.tensor([[1, 4, 4]] * 3)
    expected = run(reference, pixel_values=patches, image_grid_thw=grids)

    llm = Qwen3ForCausalLM(Qwen3Config(**text, rope_parameters=rope))
    llm.model.load_state_dict(reference.model.language_model.state_dict())
    llm.lm_head.load_state_dict(reference.lm_head.state_dict())
    options = {"embed_dim": 16, "depth": 4, "num_heads": 2}
    backbone = create_backbone(
        "timm:vit_base_patch16_224", layers=(4, 1, 2, 3), pretrained=False, image_size=64, options=options
    )
    injection = InjectionConfig(pairs=((1, 0), (2, 1), (3, 2)), merger="pixel_shuffle_mlp", when="after")
    model = build_model(backbone, Shuffled(16, 1), llm, image_token_id=IMAGE, injection=injection).eval()
    copy_linears(visual.merger, model.model.fuser, ("norm", "norm"))
    linears = (("linear_1", "linear_fc1"), ("linear_2", "linear_fc2"))
    copy_linears(visual.merger, model.model.multi_modal_projector, *linears)
    assert model.model.injection is not None
    for merger, other in zip(model.model.injection.mergers, visual.deepstack_merger_list, strict=True):
        copy_linears(other, merger, ("norm", "norm"), *linears)
    # Theirs lists patches window by window.
    raster = [rearrange(own, "(b h w p q) c -> b (h p w q) c", b=3, h=2, w=2, p=2, q=2) for own in maps]
    features = FeatureMaps(tuple(raster[index] for index in (3, 0, 1, 2)), (4, 1, 2, 3), ((4, 4),) * 4)
    model.model.vision_tower.forward = lambda _: features  # type: ignore[method-assign]

    found = run(model, pixel_values=torch.zeros(3, 3, 64, 64))
    assert_equal(found, expected)
    model.model.injection = None
    assert not torch.allclose(run(model, pixel_values=torch.zeros(3, 3, 64, 64)).logits, found.logits, atol=1e-2)


class Borrowed(nn.Module):
    """Their merger where one of ours stands."""

    def __init__(self, merger: nn.Module) -> None:
        super().__init__()
        self.merger = merger

    def forward(self, features: FeatureMaps) -> torch.Tensor:
        merged: torch.Tensor = self.merger(features[0])
        return merged


def granite(text: dict[str, Any]) -> Any:
    """Granite 4 Vision without tiles: images of one size, whose features are not packed."""
    config = theirs("Granite4VisionConfig")(
        vision_config=tiny_clip(hidden_size=64).config.to_dict(),
        text_config=text,
        image_token_index=IMAGE,
        downsample_rate="1/2",
        deepstack_layer_map=[[1, 0], [4, 2]],
        spatial_vision_layer=3,
        spatial_target_layers=[1, 3, 4, 5],
    )
    model = theirs("Granite4VisionForConditionalGeneration")(config).eval()
    randomise(model)
    inner = model.model

    def features(pixel_values: torch.Tensor, *_: Any, **__: Any) -> Any:
        states = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        pairs = zip(config.deepstack_layer_map, inner.layerwise_projectors, strict=True)
        merged = [(layer, list(merger(states[tap][:, 1:]))) for (tap, layer), merger in pairs]
        corners = zip(config.spatial_target_layers, inner.spatial_projectors, strict=True)
        merged += [(layer, list(merger(states[3][:, 1:]))) for layer, merger in corners]
        module = __import__(type(inner).__module__, fromlist=["Granite4VisionImageFeaturesOutput"])
        return module.Granite4VisionImageFeaturesOutput(deepstack_features=merged)

    inner.get_image_features = features
    return model


def test_parity_with_granite_4_vision() -> None:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 7,
        "num_attention_heads": 2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 1.5,
    }
    reference = granite(text)
    pixels = torch.randn(3, 3, 32, 32)
    expected = run(reference, pixel_values=pixels)

    llm = GraniteForCausalLM(GraniteConfig(**text))
    llm.model.load_state_dict(reference.model.language_model.state_dict())
    llm.lm_head.load_state_dict(reference.lm_head.state_dict())
    backbone = create_backbone(reference.model.vision_tower, layers=(4, 1, 3), copy=True)
    # The corners are four pairs of one tap; images are nothing but what is injected before layer 0.
    pairs = ((1, 0), (4, 2), (3, 1), (3, 3), (3, 4), (3, 5))
    injection = InjectionConfig(pairs=pairs, merger="pixel_shuffle_mlp", when="before")
    model = build_model(backbone, Shuffled(64, 1), llm, image_token_id=IMAGE, injection=injection).eval()
    nn.init.zeros_(model.model.multi_modal_projector.linear_2.weight)
    nn.init.zeros_(model.model.multi_modal_projector.linear_2.bias)
    inner = reference.model
    assert model.model.injection is not None
    mergers = (*inner.layerwise_projectors, *inner.spatial_projectors)
    model.model.injection.mergers = nn.ModuleList(map(Borrowed, mergers))

    found = run(model, pixel_values=pixels)
    assert_equal(found, expected)
    model.model.injection = None
    assert not torch.allclose(run(model, pixel_values=pixels).logits, found.logits, atol=1e-2)
