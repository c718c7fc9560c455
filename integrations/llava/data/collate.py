"""Samples joined to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch.nn import functional

from integrations.llava.prompts import IGNORE_INDEX
from layerfuse.features import FeatureMaps

__all__ = ["Collator"]


class Collator:
    """Joins samples to a batch.

    Args:
        pad_token_id: fills short samples up.
        side: where it does, right for training and left for generation.
        padding_free: samples stand one after the other in one row, and nothing is filled up.
    """

    def __init__(
        self, pad_token_id: int, *, side: Literal["right", "left"] = "right", padding_free: bool = False
    ) -> None:
        self.pad_token_id = pad_token_id
        self.side = side
        self.padding_free = padding_free

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join samples of `ConversationDataset`; all may lack `labels`, `image_sizes`, `condition` or `id`.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, T), or without padding `input_ids`, `position_ids`, which begin
            anew with each sample, and `labels` (1, T of all); with labels `label_places`, the positions of the
            flattened batch that are followed by a label of their sample; `pixel_values` (tiles of all images, C,
            height, width) and `image_sizes`, a list of (height, width), if there are any, with them `condition`
            (images, Q), ids filled up with `IGNORE_INDEX`, where samples have it; for tiles that came from a cache
            `feature_maps` in place of `pixel_values`, and if there are both `uncached`, a list with True for each tile
            of pixels; `sample_ids`, a text of each sample, where samples have an `id`; `skipped`, why samples are void,
            if any is.
        """
        batch = self._joined(samples) if self.padding_free else self._padded(samples)
        if "labels" in batch:
            # Here, since where a GPU looks for them, the host has to wait until it has found all.
            followed = functional.pad(batch["labels"][:, 1:] != IGNORE_INDEX, (0, 1))
            batch["label_places"] = followed.flatten().nonzero().flatten()
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

    def _padded(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": self._pad(ids, self.pad_token_id),
            "attention_mask": self._pad([torch.ones_like(row) for row in ids], 0),
        }
        if "labels" in samples[0]:
            batch["labels"] = self._pad([sample["labels"] for sample in samples], IGNORE_INDEX)
        return batch

    def _joined(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids = [sample["input_ids"] for sample in samples]
        batch = {"input_ids": torch.cat(ids)[None]}
        batch["position_ids"] = torch.cat([torch.arange(len(row)) for row in ids])[None]
        if "labels" in samples[0]:
            labels = torch.cat([sample["labels"] for sample in samples])[None]
            # Nothing of its own sample stands before a first label; what does must not learn to predict it.
            batch["labels"] = labels.masked_fill(batch["position_ids"] == 0, IGNORE_INDEX)
        return batch

    def _pad(self, rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            list(rows), batch_first=True, padding_value=value, padding_side=self.side
        )
