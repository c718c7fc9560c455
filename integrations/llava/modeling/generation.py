"""transformers' `generate` for prompts with images; mixed into the model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from integrations.llava.prompts import Template, TextEncoder

from .tiling import as_sizes

__all__ = ["GeneratesFromImages", "end_answers", "forbid_token"]


def forbid_token(config: GenerationConfig, token: int) -> None:
    """Add a token to those that a generation config, changed in place, never lets be chosen."""
    config.suppress_tokens = sorted({*(config.suppress_tokens or ()), token})


def end_answers(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Let answers end where training, with this tokenizer and template, taught them to, and where they ended before.

    The config is changed in place. Of texts that end answers, only those of one token are known to it;
    `generate(stop_strings=...)` knows all.
    """
    taught = [tokenizer.eos_token_id]
    if not template.end_token:
        ids = TextEncoder(tokenizer)(template.answer_end)
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

    def generate(self, *args: Any, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """As in transformers, but `pixel_values=None` means no images; transformers 5.23 would encode None.

        For a fuser that reads what is asked, `condition` goes with the images, see `get_image_features`.
        """
        images = {} if pixel_values is None else {"pixel_values": pixel_values}
        if pixel_values is None:
            kwargs.pop("condition", None)
        # transformers reads the number of texts from the first tensor that is given; of images there may be others.
        texts = {"inputs_embeds": kwargs.pop("inputs_embeds")} if "inputs_embeds" in kwargs else {}
        parent: Any = super()
        return parent.generate(*args, **texts, **images, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """As in transformers, which finds no condition among the arguments of its own `forward`."""
        parent: Any = super()
        parent._validate_model_kwargs({name: given for name, given in model_kwargs.items() if name != "condition"})

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Repeat prompts and images for beam search, each prompt's images together.

        transformers 5.17 repeats image by image, which is right only if every prompt of the batch has one image. Later
        ones repeat encoded images and leave no pixels to us.
        """
        parent: Any = super()
        repeated = expand_size > 1 and model_kwargs.get("pixel_values") is not None
        names = ("pixel_values", "image_sizes", "condition") if repeated else ()
        images = {name: model_kwargs.pop(name, None) for name in names}
        ids, rest = parent._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)
        if not images:
            return ids, rest
        layout, sizes = self.config.layout, images["image_sizes"]
        known = [None] * len(images["pixel_values"]) if sizes is None else as_sizes(sizes)
        images["image_sizes"] = None if sizes is None else torch.as_tensor(sizes)
        counts = layout.images_per_text((input_ids == layout.image_token_id).sum(1).tolist(), known)
        # Of pixels that are not filled up to equal numbers of tiles, each tile is a row.
        waiting = iter(map(layout.num_tiles, known))
        tiles = [sum(next(waiting) for _ in range(count)) for count in counts]
        for name, of_all in images.items():
            if of_all is not None:
                rows = tiles if name == "pixel_values" and of_all.ndim == 4 else counts
                rest[name] = torch.cat([own for of_text in of_all.split(rows) for own in [of_text] * expand_size])
        return ids, rest
