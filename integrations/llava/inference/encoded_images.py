"""Images encoded once: their fused and projected tokens serve all prompts that show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from integrations.llava.data import Collator
from integrations.llava.image_layout import ImageLayout
from integrations.llava.modeling import FusedLlavaForConditionalGeneration, InjectedFeatures
from layerfuse.preprocessing import AnyPreprocessing

from .recent import Recent

__all__ = ["EncodedImages", "join_prompts"]

# 54 images of LLaVA-1.5 7B in bfloat16.
_MOST_BYTES = 1 << 28


class _Tokens(NamedTuple):
    """What the language model reads of an image: its (N, D) tokens, and those that go into its layers, if any do."""

    pooled: torch.Tensor
    injected: tuple[torch.Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(own.nbytes for own in (self.pooled, *self.injected))


class EncodedImages:
    """The images of a model that were shown last, encoded.

    An image is told by its key, a hash over its pixels and, where the fuser reads it, what is asked about it. The
    model's weights must not change meanwhile.

    Args:
        model: encodes an image that is not there.
        preprocessing: normalises uint8 pixels, on the model's device.
        most_bytes: that are kept, of images shown before; 0 keeps none.
    """

    def __init__(
        self,
        model: FusedLlavaForConditionalGeneration,
        preprocessing: AnyPreprocessing,
        *,
        most_bytes: int = _MOST_BYTES,
    ) -> None:
        self.model, self.preprocessing = model, preprocessing
        self._recent: Recent[_Tokens] = Recent(most_bytes)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Encode the images of a batch.

        Args:
            batch: as `join_prompts` returns it, or a `Collator`, by whose batches no image is known again; what it
                holds of images is on the CPU.

        Returns:
            `mm_encoder_outputs` of the model's `generate` and `forward`; nothing if there are no images.
        """
        if "image_sizes" not in batch:
            return {}
        keys: Sequence[Any] = batch.get("image_keys") or [object() for _ in batch["image_sizes"]]
        places: dict[Any, int] = {}
        for place, key in enumerate(keys):
            places.setdefault(key, place)
        known = {key: tokens for key in places if (tokens := self._recent.get(key)) is not None}
        new = [key for key in places if key not in known]
        if new:
            known |= zip(new, self._encode(batch, places, new), strict=True)
        shown = [known[key] for key in keys]
        encoded: dict[str, Any] = {"pooler_output": [own.pooled for own in shown]}
        if shown[0].injected:
            of_pairs = zip(*(own.injected for own in shown), strict=True)
            encoded["deepstack_features"] = [list(images) for images in of_pairs]
        return {"mm_encoder_outputs": {"image": InjectedFeatures(**encoded)}}

    def _encode(self, batch: Mapping[str, Any], places: Mapping[Any, int], new: Sequence[Any]) -> list[_Tokens]:
        """Encode the images of new keys; pixels are those of all keys, in order."""
        device, pixels, chosen = self.model.device, batch["pixel_values"], [places[key] for key in new]
        if len(new) < len(places):
            layout = self.model.config.layout
            counts = [layout.num_tiles(batch["image_sizes"][place]) for place in places.values()]
            of_images = dict(zip(places, pixels.split(counts), strict=True))
            pixels = torch.cat([of_images[key] for key in new])
        pixels = pixels.to(device, non_blocking=True)
        if pixels.dtype == torch.uint8:
            pixels = self.preprocessing.normalize(pixels)
        asked = {"condition": batch["condition"][chosen].to(device, non_blocking=True)} if "condition" in batch else {}
        sizes = [batch["image_sizes"][place] for place in chosen]
        output: Any = self.model.get_image_features(pixels, image_sizes=sizes, **asked)
        injected = getattr(output, "deepstack_features", None) or ()
        encoded = [_Tokens(own[0], own[1:]) for own in zip(output.pooler_output, *injected, strict=True)]
        for key, own in zip(new, encoded, strict=True):
            if own.num_bytes <= self._recent.most_bytes:
                # Copies: a view would hold on to the tokens of all images that it was computed with.
                copied = _Tokens(own.pooled.clone(), tuple(tokens.clone() for tokens in own.injected))
                self._recent.put(key, copied, own.num_bytes)
        return encoded


def join_prompts(samples: Sequence[Mapping[str, Any]], *, collate: Collator, layout: ImageLayout) -> dict[str, Any]:
    """Join samples of a `Preparer` to a batch which holds the pixels of each image once, where it is shown first.

    Returns:
        What the collator returns, and `image_keys` of all images, in order; `image_sizes` and `condition` are those
        of all images, too.
    """
    seen: set[str] = set()
    slim = []
    for sample in samples:
        pixels, new = sample["pixel_values"], []
        tiles = pixels.split([layout.num_tiles(size) for size in sample["image_sizes"]]) if len(pixels) else ()
        for key, own in zip(sample["image_keys"], tiles, strict=True):
            new += [] if key in seen else [own]
            seen.add(key)
        slim.append({**sample, "pixel_values": torch.cat(new) if new else pixels[:0]})
    batch = collate(slim)
    return batch | {"image_keys": [key for sample in samples for key in sample["image_keys"]]}
