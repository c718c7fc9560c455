"""Facts about timm's windowed and hierarchical Vision Transformers: where their stages are, and what these give."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from layerfuse._block_stages import Blocks
from layerfuse.backbones._facts import as_pair
from layerfuse.backbones._stages import Stage

__all__ = ["STAGED", "stage_facts"]

# What blocks take and return, by the module of timm.models that a model's class stands in.
STAGED = {
    "hiera": "NLC",
    "hieradet_sam2": "NHWC",
    "mvitv2": "NLC",
    "pvt_v2": "NLC",
    "swin_transformer": "NHWC",
    "swin_transformer_v2": "NHWC",
    "vision_transformer_sam": "NHWC",
}


def stage_facts(model: Any, layout: str) -> dict[str, Any]:
    """Return the fields of `BackboneFacts` that stages and image sizes are about, with paths inside the model."""
    holder = next((name for name in ("layers", "stages") if hasattr(model, name)), None)
    blocks = Blocks(model, "blocks" if holder is None else f"{holder}.*.blocks")
    stages = _stages(model, blocks, layout)
    first, last = stages[0].stride, stages[-1].stride
    facts: dict[str, Any] = {
        "blocks": blocks.path,
        "embed_dim": stages[0].embed_dim,
        "num_prefix_tokens": getattr(model, "num_prefix_tokens", 0),
        "patch_size": first,
        "any_size": False,
        "stages": stages,
        # PVT normalises the maps of every stage behind its blocks.
        "tail": ("stages.*.norm",) if holder is not None and hasattr(getattr(model, holder)[0], "norm") else (),
    }
    if getattr(model.patch_embed, "img_size", None) is not None:
        facts["image_size"] = as_pair(model.patch_embed.img_size)
        # Swin builds its masks anew in each call if it is told to; SAM resamples positions, unless they are rotary.
        fixed = getattr(model, "rope_global", None) is not None
        facts["any_size"] = getattr(model, "dynamic_img_size", not fixed)
        return facts
    if hasattr(model, "reroll"):
        cells = model.tokens_spatial_shape
    elif hasattr(model.stages[0] if holder else model, "feat_size"):  # MViTv2: relative positions of one grid
        cells = model.stages[0].feat_size
    else:
        window = getattr(model, "window_spec", (1,))[0]  # HieraDet repeats the position embedding of a window
        step = tuple(max(coarse, fine * window) for coarse, fine in zip(last, first, strict=True))
        return {
            **facts,
            "image_size": as_pair(model.pretrained_cfg["input_size"][1:]),
            "any_size": True,
            "size_step": step,
        }
    return {**facts, "image_size": tuple(count * edge for count, edge in zip(cells, first, strict=True))}


def _stages(model: Any, blocks: Blocks, layout: str) -> tuple[Stage, ...]:
    """Return the stages: one in each list of blocks, or where one list goes on through all, those that it tells."""
    edge = as_pair(model.patch_embed.proj.stride)
    infos, depths = model.feature_info, blocks.depths
    ends = getattr(model, "stage_ends", None)
    if ends is not None:
        depths = tuple(end - start for start, end in pairwise((-1, *ends)))
    infos = infos[: len(depths)]
    starts = [sum(depths[:number]) for number in range(len(depths))]
    # Hiera says of every block how the grid is still split before it.
    schedule = model.reroll.schedule if hasattr(model, "reroll") else {}
    found = []
    for start, depth, info in zip(starts, depths, infos, strict=True):
        scale = info["reduction"] // infos[0]["reduction"]
        splits = schedule.get(start, ((), None))[0]
        stride = (edge[0] * scale, edge[1] * scale)
        found.append(Stage(depth, info["num_chs"], stride, layout, tuple(tuple(split) for split in splits)))
    return tuple(found)
