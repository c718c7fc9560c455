r"""Scenes written out as text: what the embedded language model learned from before it met images.

A sample is what LLaVA will show the model later, except that each visual token is the cell word of what its cell
shows, plus a code of its place: `USER: [cat][cat][K][7][P][cat]…\nWhat does the text say? ASSISTANT: K7P</s>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from integrations.llava.prompts import IGNORE_INDEX, Rendered, TextEncoder, get_template, render
from integrations.llava.synthetic.captions import scene_words
from integrations.llava.synthetic.scene import GRID, Scene

from .tokenizer import CELL_WORDS, IMAGE_TOKEN

__all__ = ["SceneWriter", "embed_written", "place_codes", "stands_for_image"]


class SceneWriter:
    """Writes scenes out as text, in the templates that the demo trains with.

    Args:
        tokenizer: one that `build_tokenizer` made.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self.image_token_id: int = vocabulary[IMAGE_TOKEN]
        self.cell_ids: dict[str, int] = {word: vocabulary[word] for word in CELL_WORDS}
        self._encoder = TextEncoder(tokenizer)

    def write(self, scene: Scene, turns: Sequence[tuple[str, str]], template: str) -> Rendered:
        """Render a conversation of questions and answers about a scene, whose cell words stand in the image's place."""
        messages = [
            {"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)
        ]
        return self._write(scene, messages, template)

    def prompt(self, scene: Scene, question: str) -> list[int]:
        """Return the ids after which the model answers a question about a scene."""
        return self._write(scene, [{"from": "human", "value": question}], "v1", answer_next=True).input_ids

    def _write(
        self, scene: Scene, messages: Sequence[Mapping[str, str]], template: str, *, answer_next: bool = False
    ) -> Rendered:
        first = {**messages[0], "value": f"<image>\n{messages[0]['value']}"}
        rendered = render(
            [first, *messages[1:]],
            template=get_template(template),
            encoder=self._encoder,
            image_token_id=self.image_token_id,
            num_images=1,
            answer_next=answer_next,
        )
        input_ids, labels = rendered.input_ids, rendered.labels
        cells = [self.cell_ids[word] for word in scene_words(scene)]
        place = input_ids.index(self.image_token_id)
        return replace(
            rendered,
            input_ids=input_ids[:place] + cells + input_ids[place + 1 :],
            labels=labels[:place] + [IGNORE_INDEX] * len(cells) + labels[place + 1 :],
        )


def place_codes(embed_dim: int, spread: float = 0.2) -> torch.Tensor:
    """Return the vectors that are added to cell words to say where they stand: (64, D), row by row.

    One fixed random vector a row and one a column. A backbone's tokens know their place, and projected ones will carry
    it in some such way; without it the model never learned to count off positions, and boxes stayed wrong.
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns = spread * torch.randn(2, GRID, embed_dim, generator=generator)
    return (rows[:, None] + columns[None]).flatten(0, 1)


def embed_written(
    model: LlamaForCausalLM, input_ids: torch.Tensor, cells: torch.Tensor, *, spread: float = 0.2
) -> torch.Tensor:
    """Embed (B, T) ids, each row with a scene of 64 cell words (ids `cells`) that get their place codes: (B, T, D)."""
    embeddings = model.get_input_embeddings()(input_ids)
    in_image = stands_for_image(input_ids, cells)
    codes = place_codes(embeddings.shape[-1], spread).to(embeddings.dtype)
    # Cells stand row by row, so counting them along the sequence numbers the places.
    place = (in_image.cumsum(1) - 1).clamp(min=0)
    return embeddings + torch.where(in_image.unsqueeze(-1), codes[place], torch.zeros((), dtype=codes.dtype))


def stands_for_image(input_ids: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Tell which of (B, T) ids stand where visual tokens will: the first 64 of `cells`, not those of an answer."""
    is_cell = torch.isin(input_ids, cells)
    return is_cell & (is_cell.cumsum(1) <= GRID * GRID)
