"""transformers' `generate` for prompts with images; mixed into the model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, islice, pairwise
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from integrations.llava.prompts import Template, TextEncoder
from layerfuse.errors import InputError

__all__ = ["GeneratesFromImages", "end_answers", "forbid_token"]


def forbid_token(config: GenerationConfig, token: int) -> None:
    """Add a token to those that a generation config, changed in place, never lets be chosen."""
    config.suppress_tokens = sorted({*(config.suppress_tokens or ()), token})


def end_answers(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Let answers end where training, with this tokenizer and template, taught them to, and where they ended before.

    The config is changed in place. Of texts that end answers, only those of one token are known to it;
    `generate(stop_strings=...)` knows all.
    """
    encoder = TextEncoder(tokenizer, template.control_tokens)
    if template.end:
        taught = encoder.control(template.end)
    else:
        ids = encoder(template.answer_end)
        taught = ids if len(ids) == 1 else []
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = list(dict.fromkeys(token for token in (*taught, *known) if token is not None))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    if tokenizer.pad_token_id is not None:
        config.pad_token_id = tokenizer.pad_token_id


class GeneratesFromImages:
    """`generate` for prompts with any number of images, none included.

    Stands in front of a class of transformers that generates, and whose config has the `layout` of its images.
    """

    config: Any
    generation_config: Any
    get_image_features: Any

    @torch.no_grad()
    def generate(
        self,
        *args: Any,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        condition: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, but `pixel_values=None` means no images, and images that were encoded may be given.

        `pixel_values`, `image_sizes` and `condition` are those of `get_image_features`; what it returns is taken
        instead as `mm_encoder_outputs={"image": ...}`.

        Raises:
            ValueError: if images are given in both forms, or as `get_image_features`.
        """
        if pixel_values is not None:
            if (mm_encoder_outputs or {}).get("image") is not None:
                raise InputError("pixel_values and mm_encoder_outputs are given, which are the images twice; give one.")
            encoded = self.get_image_features(pixel_values, image_sizes=image_sizes, condition=condition)
            mm_encoder_outputs = {"image": encoded}
        images = {"mm_encoder_outputs": mm_encoder_outputs} if mm_encoder_outputs else {}
        parent: Any = super()
        return parent.generate(*args, **images, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As in transformers, whose 5.17 knows no encoded images."""
        parent: Any = super()
        known = {name: given for name, given in model_kwargs.items() if name != "mm_encoder_outputs"}
        parent._validate_model_kwargs(known)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, and images that the cache holds go, which 5.17 would hand over again with every token."""
        if model_kwargs.get("use_cache", True):
            model_kwargs.pop("mm_encoder_outputs", None)
        parent: Any = super()
        return parent._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Repeat prompts and encoded images for beam search, each prompt's images together."""
        parent: Any = super()
        encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if expand_size == 1 or encoded is None:
            return parent._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        del model_kwargs["mm_encoder_outputs"]
        places = self._image_places(input_ids, model_kwargs.get("inputs_embeds"))
        counts = _images_per_text(places.sum(1).tolist(), [len(tokens) for tokens in encoded.pooler_output])
        ids, rest = parent._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

        def repeat(images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            waiting = iter(images)
            of_texts = [list(islice(waiting, count)) for count in counts]
            return [own for of_text in of_texts for own in of_text * expand_size]

        repeated: dict[str, Any] = {"pooler_output": repeat(encoded.pooler_output)}
        if (injected := getattr(encoded, "deepstack_features", None)) is not None:
            repeated["deepstack_features"] = [repeat(images) for images in injected]
        rest["mm_encoder_outputs"] = {"image": type(encoded)(**repeated)}
        return ids, rest

    def _image_places(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        """Find (B, T) where images are, of embedded prompts by the image token's embedding."""
        token: int = self.config.image_token_index
        if inputs_embeds is None or (input_ids is not None and input_ids.shape[1]):
            assert input_ids is not None
            return input_ids == token
        own: Any = self
        image: torch.Tensor = own.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
        return (inputs_embeds == image).all(-1)


def _images_per_text(num_tokens: Sequence[int], image_tokens: Sequence[int]) -> list[int]:
    """Number of images of each of several texts.

    Args:
        num_tokens: image tokens of each text.
        image_tokens: tokens of each image, text after text.

    Raises:
        ValueError: if the tokens of the texts are not those of the images.
    """
    ends = [0, *accumulate(image_tokens)]
    bounds = [0, *accumulate(num_tokens)]
    if bounds[-1] != ends[-1] or set(bounds) - set(ends):
        raise InputError(
            f"the texts have {list(num_tokens)} image tokens, which are not those of their {len(image_tokens)} images, "
            f"{list(image_tokens)}, in this order; expand each text with the sizes of its own images."
        )
    return [ends.index(after) - ends.index(before) for before, after in pairwise(bounds)]
