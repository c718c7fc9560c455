"""Samples joined to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from integrations.llava.prompts import IGNORE_INDEX
from layerfuse.features import FeatureMaps

__all__ = ["Collator"]


class Collator:
    """Joins samples to a batch; `pad_token_id` fills short ones up, right for training and left for generation."""

    def __init__(self, pad_token_id: int, *, side: Literal["right", "left"] = "right") -> None:
        self.pad_token_id = pad_token_id
        self.side = side

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Pad and stack samples of `ConversationDataset`; all may lack `labels`, `image_sizes`, `condition` or `id`.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, T); `pixel_values` (tiles of all images, C, height, width) and
            `image_sizes`, a list of (height, width), if there are any, with them `condition` (images, Q), ids filled up
            with `IGNORE_INDEX`, where samples have it; for tiles that came from a cache `feature_maps` in place of
            `pixel_values`, and if there are both `uncached`, a list with True for each tile of pixels; `sample_ids`, B
            texts, where samples have an `id`; `skipped`, why samples are void, if any is.
        """
        ids = [sample["input_ids"] for sample in samples]
        batch: dict[str, Any] = {
            "input_ids": self._pad(ids, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(row) for row in ids], 0),
        }
        if "labels" in samples[0]:
            batch["labels"] = self._pad([sample["labels"] for sample in samples], IGNORE_INDEX)
        pixels = torch.cat([sample["pixel_values"] for sample in samples])
        maps = [maps for sample in samples for maps in sample.get("feature_maps", ())]
        if len(pixels):
            batch["pixel_values"] = pixels
        if maps:
            batch["feature_maps"] = FeatureMaps.cat(maps)
        if maps and len(pixels):
            batch["uncached"] = [tile for sample in samples for tile in sample["uncached"]]
        if maps or len(pixels):
            if "image_sizes" in samples[0]:
                # Numbers, not a tensor: the model reads them, and would make the host wait for a GPU.
                batch["image_sizes"] = [size for sample in samples for size in sample["image_sizes"]]
            if "condition" in samples[0]:
                batch["condition"] = self._pad([ids for sample in samples for ids in sample["condition"]], IGNORE_INDEX)
        if "id" in samples[0]:
            batch["sample_ids"] = [sample["id"] for sample in samples]
        skipped = [sample["skipped"] for sample in samples if "skipped" in sample]
        if skipped:
            batch["skipped"] = skipped
        return batch

    def _pad(self, rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            list(rows), batch_first=True, padding_value=value, padding_side=self.side
        )
