"""Facts about the windowed and hierarchical vision models of transformers: where their stages are, what these give."""

from __future__ import annotations

from typing import Any

from layerfuse.backbones._facts import as_pair
from layerfuse.backbones._stages import Stage
from layerfuse.errors import InputError

__all__ = ["STAGED", "reset_windows", "stage_facts"]

# Model types, and where the blocks of each are.
STAGED = {
    "hiera": "encoder.stages.*.layers",
    "sam2_hiera_det_model": "blocks",
    "sam_vision_model": "layers",
    "swin": "encoder.layers.*.blocks",
    "swinv2": "encoder.layers.*.blocks",
    "vitdet": "encoder.layer",
}
_LAYOUTS = {"sam2_hiera_det_model": "NHWC", "sam_vision_model": "NHWC", "vitdet": "NCHW"}
# The models that take what a block returns apart.
_PAIRS = ("hiera", "swin", "swinv2", "vitdet")
# Sizes that are fixed once the model is built: SAM's embedding checks it, and Swin's windows shrink to the first image.
_ONE_SIZE = ("sam_vision_model", "swin")


def stage_facts(config: Any) -> dict[str, Any]:
    """Return the fields of `BackboneFacts` that stages and image sizes are about, of a model type in `STAGED`."""
    kind = config.model_type
    edge = as_pair(getattr(config, "patch_stride", None) or config.patch_size)
    depths, widths, pools, step = _stage_numbers(config)
    layout, splits = _LAYOUTS.get(kind, "NLC"), [step] * (len(depths) - 1)
    stages = []
    for number, (depth, width) in enumerate(zip(depths, widths, strict=True)):
        pooled = min(number, pools)
        stride = (edge[0] * step[0] ** pooled, edge[1] * step[1] ** pooled)
        unrolled = tuple(splits[pooled:]) if kind == "hiera" else ()
        stages.append(Stage(depth, width, stride, layout, unrolled))
    # Hiera's windows are whole, and so are those for which SAM 2's repeats its position embedding.
    window = getattr(config, "masked_unit_size", getattr(config, "window_size_per_stage", [1])[:1] * 2)
    return {
        "blocks": STAGED[kind],
        "embed_dim": widths[0],
        "num_prefix_tokens": 0,
        "patch_size": edge,
        "image_size": as_pair(config.image_size),
        "any_size": kind not in _ONE_SIZE,
        "stages": tuple(stages),
        "returns_pairs": kind in _PAIRS,
        "size_step": (edge[0] * window[0], edge[1] * window[1]),
    }


def reset_windows(model: Any, image_size: tuple[int, int]) -> None:
    """Give a Swin model the windows that it was built with: it shrinks them to an image, and keeps them so.

    Raises:
        ValueError: if the images are too small for the windows of a stage that is left.
    """
    window, stages = model.config.window_size, model.encoder.layers
    stride = max(as_pair(model.config.patch_size)) * 2 ** (len(stages) - 1)
    if -(-min(image_size) // stride) < window:
        raise InputError(
            f"images of {image_size[0]}x{image_size[1]} pixels are too small for the windows of this "
            f"{type(model).__name__}: its last stage has {window}x{window} cells of {stride} pixels in a window, so "
            f"both edges must be at least {(window - 1) * stride + 1} pixels; give another image_size, or tap earlier "
            "layers."
        )
    for stage in stages:
        for number, block in enumerate(stage.blocks):
            block.window_size, block.shift_size = window, number % 2 * (window // 2)


def _stage_numbers(config: Any) -> tuple[list[int], list[int], int, tuple[int, int]]:
    """Return depth and width of each stage, how many of their borders pool, and the (height, width) by which."""
    if hasattr(config, "blocks_per_stage"):  # SAM 2
        widths = list(config.embed_dim_per_stage)
        return list(config.blocks_per_stage), widths, config.num_query_pool_stages, as_pair(config.query_stride)
    if not hasattr(config, "depths"):
        return [config.num_hidden_layers], [config.hidden_size], 0, (1, 1)
    depths = list(config.depths)
    growth = getattr(config, "embed_dim_multiplier", 2)
    widths = [int(config.embed_dim * growth**stage) for stage in range(len(depths))]
    pools, step = getattr(config, "num_query_pool", len(depths) - 1), as_pair(getattr(config, "query_stride", 2))
    return depths, widths, pools, step
