"""A tiny model with layer injection, and batches for it, that several files of tests share."""

from __future__ import annotations

from typing import Any

import torch

from integrations.llava.config import InjectionConfig
from integrations.llava.modeling.build import build_model
from integrations.llava.modeling.model import FusedLlavaForConditionalGeneration
from layerfuse.backbones import create_backbone
from layerfuse.fusers import create_fuser
from layerfuse.testing import random_images, randomise_parameters
from tests.integrations.llava.tiny_parts import tiny_llm

__all__ = ["IMAGE", "PAIRS", "TOKENS", "VOCABULARY", "batch", "make_model", "randomised"]

VOCABULARY, IMAGE, TOKENS = 50, 49, 16
PAIRS = ((1, 0), (4, 2), (2, 1))
"""Layer 1 is the fuser's, too; 4 is only injected; order and layers are mixed on purpose."""


def make_model(
    pairs: tuple[tuple[int, ...], ...] = PAIRS,
    *,
    fuser: str = "concat",
    layers: tuple[int, ...] = (1, 2, 3),
    llm: Any = None,
    **settings: Any,
) -> FusedLlavaForConditionalGeneration:
    """A model whose mergers are new; the same weights elsewhere, whatever is injected."""
    torch.manual_seed(0)
    llm = llm or tiny_llm(VOCABULARY - 1, num_hidden_layers=4)
    depth = 4
    taps = tuple(dict.fromkeys((*layers, *(tap % (depth + 1) for *injected, _ in pairs for tap in injected))))
    options = {"embed_dim": 32, "depth": depth, "num_heads": 2}
    name = "timm:vit_base_patch16_clip_quickgelu_224"
    backbone = create_backbone(name, layers=taps, pretrained=False, image_size=64, options=options)
    own = {"mmfuser": {"num_heads": 4}, "text_gated": {"condition_channels": 32, "groups": 2}}
    made = create_fuser(fuser, in_channels=32, num_layers=len(layers), options=own.get(fuser))
    injection = InjectionConfig(pairs=pairs, **settings) if pairs else None
    return build_model(backbone, made, llm, image_token_id=IMAGE, injection=injection).eval()


def randomised(model: FusedLlavaForConditionalGeneration) -> FusedLlavaForConditionalGeneration:
    """The model, with random numbers in its mergers."""
    assert model.model.injection is not None
    randomise_parameters(model.model.injection)
    return model


def batch(counts: tuple[int, ...] = (1, 1)) -> dict[str, torch.Tensor]:
    """Prompts with so many images each, the shorter ones padded on the left, as generation has them."""
    rows = [[1, *([5, *[IMAGE] * TOKENS] * count), 6, 7, 8] for count in counts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    prepared = {"input_ids": ids, "attention_mask": mask}
    return prepared | {"pixel_values": random_images(sum(counts), size=64)} if sum(counts) else prepared
