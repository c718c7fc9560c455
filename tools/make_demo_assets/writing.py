r"""Scenes written out as text: what the embedded language model learned from before it met images.

A sample is what LLaVA will show the model later, except that each visual token is the cell word of what its cell
shows, plus a code of its place: `USER: [cat][cat][K][7][P][cat]…\nWhat does the text say? ASSISTANT: K7P</s>`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from integrations.llava.prompts import IGNORE_INDEX, TextEncoder, get_template, render
from integrations.llava.synthetic.captions import scene_words
from integrations.llava.synthetic.scene import GRID, Scene

from .tokenizer import CELL_WORDS, IMAGE_TOKEN

__all__ = [
    "SceneWriter",
    "WrittenScene",
    "embed_written",
    "place_codes",
    "stands_for_image",
]


@dataclass(frozen=True)
class WrittenScene:
    """A scene and its conversation as tokens.

    Attributes:
        input_ids: T ids; the scene is written out in cell words.
        labels: T ids where the model answers, else `IGNORE_INDEX`.
    """

    input_ids: list[int]
    labels: list[int]


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

    def write(self, scene: Scene, turns: Sequence[tuple[str, str]], template: str) -> WrittenScene:
        """Write a scene and a conversation about it.

        Args:
            scene: what stands in the image's place.
            turns: questions and answers.
            template: name of a prompt template.
        """
        messages = [
            {"from": role, "value": text}
            for number, turn in enumerate(turns)
            for role, text in zip(
                ("human", "gpt"), (turn[0] if number else f"<image>\n{turn[0]}", turn[1]), strict=True
            )
        ]
        return self._write(scene, messages, template)

    def prompt(self, scene: Scene, question: str, template: str = "v1") -> list[int]:
        """Return the ids after which the model answers a question about a scene."""
        messages = [{"from": "human", "value": f"<image>\n{question}"}]
        return self._write(scene, messages, template, answer_next=True).input_ids

    def _write(
        self, scene: Scene, messages: Sequence[Mapping[str, str]], template: str, *, answer_next: bool = False
    ) -> WrittenScene:
        """Render messages and put the scene's cell words in place of the image token."""
        rendered = render(
            messages,
            template=get_template(template),
            encoder=self._encoder,
            image_token_id=self.image_token_id,
            num_images=1,
            answer_next=answer_next,
        )
        input_ids, labels = rendered.input_ids, rendered.labels
        cells = [self.cell_ids[word] for word in scene_words(scene)]
        place = input_ids.index(self.image_token_id)
        return WrittenScene(
            input_ids[:place] + cells + input_ids[place + 1 :],
            labels[:place] + [IGNORE_INDEX] * len(cells) + labels[place + 1 :],
        )


def place_codes(embed_dim: int, spread: float = 0.2) -> torch.Tensor:
    """Return what is added to each cell word to say where it is: (64, D), row by row.

    One fixed random vector a row and one a column. A backbone's tokens know their place, and projected ones will carry
    it in some such way; without it the model never learned to count off positions, and boxes stayed wrong.
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns = spread * torch.randn(2, GRID, embed_dim, generator=generator)
    return (rows[:, None] + columns[None]).flatten(0, 1)


def embed_written(
    model: LlamaForCausalLM, input_ids: torch.Tensor, cells: torch.Tensor, *, spread: float = 0.2
) -> torch.Tensor:
    """Embed written scenes, places included.

    Args:
        model: the language model.
        input_ids: (B, T); every row holds one scene of 64 cell words.
        cells: ids of the cell words.
        spread: standard deviation of the place codes; 0 leaves places out.

    Returns:
        (B, T, D) embeddings.
    """
    embeddings = model.get_input_embeddings()(input_ids)
    in_image = stands_for_image(input_ids, cells)
    codes = place_codes(embeddings.shape[-1], spread).to(embeddings.dtype)
    # Cells stand row by row, so counting them along the sequence numbers the places.
    place = (in_image.cumsum(1) - 1).clamp(min=0)
    return embeddings + torch.where(in_image.unsqueeze(-1), codes[place], torch.zeros((), dtype=codes.dtype))


def stands_for_image(input_ids: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Tell which tokens stand where visual tokens will: the first 64 cell words, not those of a written answer.

    Args:
        input_ids: (B, T).
        cells: ids of the cell words.

    Returns:
        (B, T) bool.
    """
    is_cell = torch.isin(input_ids, cells)
    return is_cell & (is_cell.cumsum(1) <= GRID * GRID)
