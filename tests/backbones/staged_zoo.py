"""Tiny windowed and hierarchical models, each with its library's own maps, which have several grids and widths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from layerfuse.backbones import Backbone, create_backbone
from layerfuse.testing import random_images, randomise_parameters
from tools.model_table.hidden_states import maps_before_the_norm, stage_maps

Maps = dict[int, torch.Tensor]


@dataclass(frozen=True)
class StagedCase:
    """One tiny model.

    ``depths``, ``widths``, ``strides`` are those of its stages. ``library`` gives the maps (B, C, H, W) of layers that
    the library has a way to, at least those at the ends of the stages.
    """

    name: str
    build: Callable[[], nn.Module]
    library: Callable[[Any, torch.Tensor], Maps]
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    strides: tuple[int, ...]
    size: int = 64

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return randomise_parameters(self.build(), std=0.1).eval()

    def backbone(self, model: nn.Module | None = None, layers: Any = lambda depth: range(depth + 1)) -> Backbone:
        return create_backbone(self.model() if model is None else model, layers=layers)

    def images(self, batch_size: int = 3) -> torch.Tensor:
        return random_images(batch_size, size=self.size)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(accumulate(self.depths))

    def of_layers(self, of_stages: tuple[int, ...]) -> tuple[int, ...]:
        blocks = [each for each, depth in zip(of_stages, self.depths, strict=True) for _ in range(depth)]
        return (blocks[0], *blocks)

    def __str__(self) -> str:
        return self.name


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return build


SWIN = {"img_size": 64, "embed_dim": 16, "depths": (2, 2, 2), "num_heads": (2, 2, 4), "window_size": 4}

TIMM_CASES = (
    StagedCase(
        "swin", timm_model("swin_tiny_patch4_window7_224", **SWIN), stage_maps, (2, 2, 2), (16, 32, 64), (4, 8, 16)
    ),
    StagedCase(
        "swinv2", timm_model("swinv2_tiny_window8_256", **SWIN), stage_maps, (2, 2, 2), (16, 32, 64), (4, 8, 16)
    ),
    StagedCase(
        "hiera",
        timm_model("hiera_tiny_224", img_size=64, embed_dim=16, num_heads=1, stages=(1, 2, 2, 1)),
        stage_maps,
        (1, 2, 2, 1),
        (16, 32, 64, 128),
        (4, 8, 16, 32),
    ),
    StagedCase(
        "sam",
        timm_model(
            "samvit_base_patch16",
            img_size=64,
            embed_dim=32,
            depth=3,
            num_heads=2,
            window_size=3,
            global_attn_indexes=(1,),
        ),
        stage_maps,
        (3,),
        (32,),
        (16,),
    ),
    StagedCase(
        "sam2_hiera",
        timm_model("sam2_hiera_tiny", embed_dim=16, num_heads=1, stages=(1, 2, 2, 1), global_att_blocks=(4,)),
        stage_maps,
        (1, 2, 2, 1),
        (16, 32, 64, 128),
        (4, 8, 16, 32),
    ),
    StagedCase(
        "mvitv2",
        timm_model("mvitv2_tiny", img_size=64),
        stage_maps,
        (1, 2, 5, 2),
        (96, 192, 384, 768),
        (4, 8, 16, 32),
    ),
    StagedCase(
        "pvt_v2",
        timm_model("pvt_v2_b0", depths=(1, 2, 1, 1), embed_dims=(16, 32, 32, 64), num_heads=(1, 1, 1, 1)),
        maps_before_the_norm,
        (1, 2, 1, 1),
        (16, 32, 32, 64),
        (4, 8, 16, 32),
    ),
)


def hugging_face(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import AutoConfig, AutoModel

        return AutoModel.from_config(AutoConfig.for_model(kind, **options))

    return build


def swin_maps(model: Any, images: torch.Tensor) -> Maps:
    # The model's own hidden states are those behind the merging of patches; the encoder gives those before it, too.
    embedded, grid = model.embeddings(images)
    before: Any = {"output_hidden_states": True, "output_hidden_states_before_downsampling": True}
    found = model.encoder(embedded, grid, **before).reshaped_hidden_states
    return dict(zip((0, *accumulate(model.config.depths)), found, strict=True))


def hiera_maps(model: Any, images: torch.Tensor) -> Maps:
    found = model(images, output_hidden_states=True).reshaped_hidden_states
    ends = (0, *accumulate(model.config.depths))
    return {layer: state.permute(0, 3, 1, 2) for layer, state in zip(ends, found, strict=True)}


def sam_maps(model: Any, images: torch.Tensor) -> Maps:
    # The last of these is the neck's; a hook has what went into it.
    kept: list[torch.Tensor] = []
    hook = model.vision_encoder.neck.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    found = model(images, output_hidden_states=True).hidden_states
    hook.remove()
    states = [*found[: model.config.num_hidden_layers], *kept]
    return {layer: state.permute(0, 3, 1, 2) for layer, state in enumerate(states)}


def sam2_hiera_maps(model: Any, images: torch.Tensor) -> Maps:
    found = model(images).intermediate_hidden_states
    ends = accumulate(model.config.blocks_per_stage)
    return {layer: state.permute(0, 3, 1, 2) for layer, state in zip(ends, found, strict=True)}


def vitdet_maps(model: Any, images: torch.Tensor) -> Maps:
    return dict(enumerate(model(images, output_hidden_states=True).hidden_states))


HF_SWIN = {"image_size": 64, "embed_dim": 16, "depths": [2, 2, 2], "num_heads": [2, 2, 4], "window_size": 4}
FOUR = ((1, 2, 2, 1), (16, 32, 64, 128), (4, 8, 16, 32))

TRANSFORMERS_CASES = (
    StagedCase("transformers-swin", hugging_face("swin", **HF_SWIN), swin_maps, (2, 2, 2), (16, 32, 64), (4, 8, 16)),
    StagedCase(
        "transformers-swinv2", hugging_face("swinv2", **HF_SWIN), swin_maps, (2, 2, 2), (16, 32, 64), (4, 8, 16)
    ),
    StagedCase(
        "transformers-hiera",
        hugging_face("hiera", image_size=[64, 64], embed_dim=16, depths=[1, 2, 2, 1], num_heads=[1, 2, 4, 8]),
        hiera_maps,
        *FOUR,
    ),
    StagedCase(
        "transformers-sam",
        hugging_face(
            "sam_vision_model",
            image_size=64,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            window_size=3,
            global_attn_indexes=[1],
            mlp_dim=64,
        ),
        sam_maps,
        (3,),
        (32,),
        (16,),
    ),
    StagedCase(
        "transformers-sam2_hiera",
        hugging_face(
            "sam2_hiera_det_model",
            image_size=[64, 64],
            hidden_size=16,
            blocks_per_stage=[1, 2, 2, 1],
            embed_dim_per_stage=[16, 32, 64, 128],
            num_attention_heads_per_stage=[1, 2, 4, 8],
            global_attention_blocks=[4],
        ),
        sam2_hiera_maps,
        *FOUR,
    ),
    StagedCase(
        "transformers-vitdet",
        hugging_face(
            "vitdet",
            image_size=64,
            pretrain_image_size=64,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            window_size=3,
            window_block_indices=[0],
            use_relative_position_embeddings=True,
        ),
        vitdet_maps,
        (3,),
        (32,),
        (16,),
    ),
)
CASES = TIMM_CASES + TRANSFORMERS_CASES
