"""What a conversation keeps from turn to turn, so that a turn costs its own words and images only."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationMixin, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from integrations.llava.image_layout import ImageLayout, ImageSize
from integrations.llava.modeling import FusedLlavaForConditionalGeneration
from layerfuse.preprocessing import AnyPreprocessing

from .encoded_images import EncodedImages
from .pictures import RecentPictures

__all__ = ["CACHE_ARGUMENT", "ConversationMemory", "new_static_cache"]

_ARGUMENTS = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_ARGUMENT = "cache" if "cache" in _ARGUMENTS else "past_key_values"
"""What transformers calls a cache that is given to `generate`: another name since 5.24."""

# A cache of fixed size has room for a multiple of so many positions.
_STEP = 1024


class ConversationMemory:
    """Images of one conversation, prepared and encoded, and the keys and values of what was read and written last.

    A prompt that begins like it is read from where it differs; another is read whole.

    Args:
        model: that answers.
        preprocessing: of its images.
        static: whether the cache has a fixed size, with which decoding can be compiled.
    """

    def __init__(
        self, model: FusedLlavaForConditionalGeneration, preprocessing: AnyPreprocessing, *, static: bool = False
    ) -> None:
        self.pictures = RecentPictures()
        self.encoded = EncodedImages(model, preprocessing)
        self.cache: Cache | None = None
        self._room = math.inf
        self._model, self._static = model, static
        self._ids: list[int] = []
        self._keys: list[str] = []

    @torch.inference_mode()
    def resume(self, sample: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
        """Make the cache hold the beginning of a prompt, and return the rest.

        Args:
            sample: the prompt, as a `Preparer` returns it.
            max_new_tokens: for which the cache has to have room behind it.

        Returns:
            The sample without the positions, at least one of which is left, and images that the cache holds.
        """
        ids, keys = sample["input_ids"].tolist(), sample["image_keys"]
        spans = _image_spans(ids, sample["image_sizes"], self._model.config.layout)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(ids[:-1], self._ids, strict=False))
        start = sum(1 for _ in same)
        for place, (first, behind) in enumerate(spans):
            if first < start and (behind > start or keys[place] not in self._keys[place : place + 1]):
                start = first
        start = self._shorten(start, len(ids) + max_new_tokens)
        self._ids, self._keys = ids[:start], keys
        shown = sum(first < start for first, _ in spans)
        tiles = sum(self._model.config.layout.num_tiles(size) for size in sample["image_sizes"][:shown])
        rest = {
            **sample,
            "input_ids": sample["input_ids"][start:],
            "pixel_values": sample["pixel_values"][tiles:],
            "image_sizes": sample["image_sizes"][shown:],
            "image_keys": keys[shown:],
        }
        return rest | {name: sample[name][shown:] for name in ("condition",) if name in sample}

    def hold(self, ids: Sequence[int]) -> None:
        """Note the ids behind those that the cache held, as far as it has read them by now."""
        assert self.cache is not None
        self._ids = [*self._ids, *ids][: int(self.cache.get_seq_length())]

    def _shorten(self, length: int, room: int) -> int:
        """Leave at most `length` positions in the cache, which has room for so many; return how many are left."""
        held, cache = len(self._ids), self.cache
        if cache is not None and room <= self._room and int(cache.get_seq_length()) == held:
            kinds = {type(layer) for layer in cache.layers}
            if length == held and kinds <= {DynamicLayer, DynamicSlidingWindowLayer, StaticLayer}:
                return length
            if length and kinds <= {DynamicLayer, StaticLayer}:  # windows that have forgotten cannot go back
                for layer in cache.layers:
                    _crop(layer, held - length)
                return length
        if isinstance(cache, StaticCache) and room <= self._room:
            cache.reset()
        elif self._static:
            self.cache, self._room = new_static_cache(self._model, room)
        else:
            self.cache = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        return 0


def _crop(layer: Any, count: int) -> None:
    """Take the last positions out of a layer of a cache; what was written there, later positions write over."""
    if hasattr(layer, "crop"):
        layer.crop(-count)
    else:  # of fixed size, in transformers 5.17
        layer.cumulative_length.sub_(count)


def new_static_cache(
    model: FusedLlavaForConditionalGeneration, length: int, *, step: int = _STEP
) -> tuple[StaticCache, int]:
    """Make a cache of fixed size for a model's prompts and answers.

    Args:
        model: that fills it.
        length: of prompt and answer.
        step: of which the size is a multiple: a model is compiled for each size.

    Returns:
        The cache, and the positions for which it has room.
    """
    room = -(-length // step) * step
    return StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=room), room


def _image_spans(
    ids: Sequence[int], image_sizes: Sequence[ImageSize | None], layout: ImageLayout
) -> list[tuple[int, int]]:
    """Find the first position of each image, and that behind it."""
    positions = [place for place, token in enumerate(ids) if token == layout.image_token_id]
    spans, seen = [], 0
    for size in image_sizes:
        count = layout.num_tokens(size)
        spans.append((positions[seen], positions[seen + count - 1] + 1))
        seen += count
    return spans
