"""Facts about timm's windowed and hierarchical Vision Transformers: where their stages are, and what these give."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

from layerfuse._block_stages import Blocks
from layerfuse.backbones._facts import as_pair
from layerfuse.backbones._stages import Stage

__all__ = ["STAGED", "stage_facts"]

_Sizes = Callable[[Any, tuple[Stage, ...]], dict[str, Any]]


def _swin_sizes(model: Any, stages: tuple[Stage, ...]) -> dict[str, Any]:
    # With dynamic_img_size the masks of shifted windows are made anew in each call.
    return {"image_size": as_pair(model.patch_embed.img_size), "any_size": model.dynamic_img_size}


def _sam_sizes(model: Any, stages: tuple[Stage, ...]) -> dict[str, Any]:
    return {"image_size": as_pair(model.patch_embed.img_size), "any_size": model.rope_global is None}


def _hiera_sizes(model: Any, stages: tuple[Stage, ...]) -> dict[str, Any]:
    return _fixed(model.tokens_spatial_shape, stages)


def _mvit_sizes(model: Any, stages: tuple[Stage, ...]) -> dict[str, Any]:
    return _fixed(model.stages[0].feat_size, stages)  # that of its relative positions


def _any_sizes(model: Any, stages: tuple[Stage, ...]) -> dict[str, Any]:
    window = getattr(model, "window_spec", (1,))[0]  # for which SAM 2's Hiera repeats its position embedding
    edges = zip(stages[0].stride, stages[-1].stride, strict=True)
    step = tuple(max(window * fine, coarse) for fine, coarse in edges)
    return {"image_size": as_pair(model.pretrained_cfg["input_size"][1:]), "any_size": True, "size_step": step}


def _fixed(cells: tuple[int, int], stages: tuple[Stage, ...]) -> dict[str, Any]:
    size = tuple(count * edge for count, edge in zip(cells, stages[0].stride, strict=True))
    return {"image_size": size, "any_size": False}


class _Kind(NamedTuple):
    """A kind of model: the path of its blocks, what these take and return, and its image sizes."""

    blocks: str
    layout: str
    sizes: _Sizes
    returns_pairs: bool = False
    tail: tuple[str, ...] = ()


# By the module of timm.models that a model's class stands in.
STAGED = {
    "hiera": _Kind("blocks", "NLC", _hiera_sizes),
    "hieradet_sam2": _Kind("blocks", "NHWC", _any_sizes),
    "mvitv2": _Kind("stages.*.blocks", "NLC", _mvit_sizes, returns_pairs=True),
    "pvt_v2": _Kind("stages.*.blocks", "NLC", _any_sizes, tail=("stages.*.norm",)),
    "swin_transformer": _Kind("layers.*.blocks", "NHWC", _swin_sizes),
    "swin_transformer_v2": _Kind("layers.*.blocks", "NHWC", _swin_sizes),
    "vision_transformer_sam": _Kind("blocks", "NHWC", _sam_sizes),
}


def stage_facts(model: Any, kind: str, path: str) -> dict[str, Any]:
    """Return the fields of `BackboneFacts` that stages and image sizes are about, of a model of a kind in `STAGED`.

    ``path`` is where the model lies inside the module that is tapped, ending in a dot.
    """
    own = STAGED[kind]
    stages = _stages(model, own)
    return {
        "blocks": path + own.blocks,
        "embed_dim": stages[0].embed_dim,
        "num_prefix_tokens": getattr(model, "num_prefix_tokens", 0),
        "patch_size": stages[0].stride,
        "stages": stages,
        "returns_pairs": own.returns_pairs,
        "tail": tuple(path + name for name in own.tail),
        **own.sizes(model, stages),
    }


def _stages(model: Any, own: _Kind) -> tuple[Stage, ...]:
    """Return the stages: one in each list of blocks, or where one list goes on through all, those that it tells."""
    edge, infos, depths = as_pair(model.patch_embed.proj.stride), model.feature_info, Blocks(model, own.blocks).depths
    if hasattr(model, "stage_ends"):
        depths = tuple(end - start for start, end in pairwise((-1, *model.stage_ends)))
    # Hiera says of every block how the grid is still split before it.
    schedule = model.reroll.schedule if hasattr(model, "reroll") else {}
    found: list[Stage] = []
    for depth, info in zip(depths, infos, strict=False):  # SAM tells the same of every block
        scale = info["reduction"] // infos[0]["reduction"]
        splits, _ = schedule.get(sum(stage.num_blocks for stage in found), ((), None))
        stride = (edge[0] * scale, edge[1] * scale)
        found.append(Stage(depth, info["num_chs"], stride, own.layout, tuple(tuple(split) for split in splits)))
    return tuple(found)
