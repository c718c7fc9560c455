"""What every layout is brought to before it is written as another: our model, its weights still in their files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from integrations.llava.image_layout import ImageLayout
from integrations.llava.modeling import FusedLlavaForConditionalGeneration, build_model, end_answers
from integrations.llava.prompts import Template
from layerfuse.backbones import Backbone
from layerfuse.errors import InputError, MissingFileError, UserError
from layerfuse.fusers import Fuser
from layerfuse.preprocessing import Preprocessing

from .tensors import StoredTensor, check_fit, read_json

__all__ = [
    "KEPT_FILES",
    "TOKENIZER_FILES",
    "Content",
    "Origin",
    "check_files",
    "check_weights",
    "copy_files",
    "meta_model",
    "read_tokenizer",
    "reading",
    "token_ids",
    "with_rows",
]

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
KEPT_FILES = (
    *TOKENIZER_FILES,
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""Small files of another layout that a converted model keeps, so that it can go back as it came."""

_MOST_LISTED = 20
_EMBEDDING, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Origin:
    """Where a model came from, if it was converted.

    Attributes:
        layout: the layout it had.
        folder: with that layout's small files (`KEPT_FILES`).
        has_tower: whether its weights included the vision model's.
        config: its `config.json`.
    """

    layout: str
    folder: Path
    has_tower: bool
    config: dict[str, Any]


@dataclass(frozen=True)
class Content:
    """A checkpoint in our terms.

    Attributes:
        model: on the meta device; it has the config and every weight's name and shape.
        tensors: its weights, in their files, under its names.
        tokenizer: with `<image>`.
        preprocessing: of images, as the model is to be used.
        template: how prompts are written.
        tail: weights of the vision model behind the deepest tapped layer, which our model leaves out.
        origin: None for a model that was trained here.
        folder: where it was read from.
        generation: settings of `generate` that go with it.
    """

    model: FusedLlavaForConditionalGeneration
    tensors: Mapping[str, StoredTensor]
    tokenizer: PreTrainedTokenizerBase
    preprocessing: Preprocessing
    template: Template
    folder: Path
    tail: Mapping[str, StoredTensor] = field(default_factory=dict)
    origin: Origin | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def backbone(self) -> Backbone:
        """The backbone, on the meta device."""
        return self.model.model.vision_tower.backbone

    @property
    def fuser(self) -> Fuser:
        """The fuser, on the meta device."""
        return self.model.model.fuser

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model's stored weights."""
        embedding = self.model.get_input_embeddings().weight
        return self.tensors[next(name for name, own in self.model.named_parameters() if own is embedding)].dtype

    @property
    def generation_config(self) -> dict[str, Any]:
        """Settings of `generate`: an answer ends with what training taught, and with what ended a text before."""
        ids = {name: self.generation.get(name) for name in ("eos_token_id", "pad_token_id")}
        config = GenerationConfig(**ids)
        end_answers(config, self.tokenizer, self.template)
        ids = {name: getattr(config, name) for name in ids}
        return {**self.generation, **{name: number for name, number in ids.items() if number is not None}}

    @property
    def own_vocabulary(self) -> int:
        """Rows of the language model's embedding without what was added for images."""
        rows, image = self.tensors[_EMBEDDING].shape[0], self.model.config.image_token_index
        tokens = self.tokenizer.get_vocab()
        behind = {token for token, number in tokens.items() if number > image}
        # `<image>` and what follows it (a padding token, rows that fill up) is no part of the language model.
        return rows if behind - set(self.tokenizer.all_special_tokens) else min(rows, image)


def meta_model(
    backbone: Backbone,
    fuser: Fuser,
    text_config: PreTrainedConfig,
    *,
    image_token_id: int,
    template: Template,
    head: Mapping[str, Any] | None = None,
    layout: ImageLayout | None = None,
) -> FusedLlavaForConditionalGeneration:
    """Assemble a model that takes no memory.

    Args:
        backbone: on the meta device.
        fuser: on the meta device.
        text_config: of the language model; its vocabulary grows if it has no row for the image token.
        image_token_id: the tokenizer's id of `<image>`.
        template: how prompts are written.
        head: what the layout's own model does beside the product with its head's weight, the fields of `HeadSettings`;
            the language model's class may do another thing where it stands alone.
        layout: as for `build_model`.
    """
    text_config.vocab_size = max(text_config.vocab_size, image_token_id + 1)
    with torch.device("meta"):
        with reading("the language model's config"):
            llm = AutoModelForCausalLM.from_config(text_config)
        return build_model(
            backbone,
            fuser,
            llm,
            image_token_id=image_token_id,
            prompt_template=template.to_dict(),
            layout=layout,
            head=head or {},
        )


def check_weights(
    model: FusedLlavaForConditionalGeneration, tensors: Mapping[str, StoredTensor], where: str
) -> dict[str, StoredTensor]:
    """Compare stored weights with those the model has.

    Args:
        model: what its config describes.
        tensors: under our names.
        where: they come from, for the message.

    Returns:
        The weights, in the model's order; a head that is tied to the embedding may be left out.

    Raises:
        ValueError: listing missing, unexpected and misshapen weights.
    """
    expected = model.state_dict()
    if getattr(model.config.text_config, "tie_word_embeddings", False) and _HEAD not in tensors:
        del expected[_HEAD]
    check_fit(
        expected,
        tensors,
        fault=f"the weights of {where} are not those of the model its config describes (in our names)",
        advice="Check that config and weights belong together",
        most=_MOST_LISTED,
    )
    return {name: tensors[name] for name in expected}


def with_rows(tensors: Mapping[str, StoredTensor], rows: int) -> dict[str, StoredTensor]:
    """Give embedding and head another number of rows: new ones are zero, surplus ones are cut.

    A row for the image token is never read: its place in the text is taken by image features, and the head forbids it.

    Args:
        tensors: of the whole model, under our names.
        rows: of the result.
    """
    changed = dict(tensors)
    for name in (_EMBEDDING, _HEAD):
        if name in tensors and tensors[name].shape[0] != rows:
            changed[name] = tensors[name].then(lambda tensor: _resize(tensor, rows), (rows, *tensors[name].shape[1:]))
    return changed


def _resize(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    kept = tensor[:rows]
    return torch.cat([kept, kept.new_zeros(rows - len(kept), *kept.shape[1:])])


def check_files(folder: Path) -> None:
    """Make sure that the small files of a checkpoint came whole: a library that reads half of one fails anywhere.

    Raises:
        ValueError: naming one that is no JSON object in UTF-8.
    """
    for name in KEPT_FILES:
        if name.endswith(".json") and (folder / name).is_file():
            read_json(folder / name)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what a library says about a file that it cannot make sense of into an error of ours.

    Args:
        what: it reads; the block calls the library and does nothing else.

    Raises:
        ValueError: in place of the library's own error.
    """
    try:
        yield
    except UserError:
        raise
    except (
        StrictDataclassError,
        ArithmeticError,
        AttributeError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise InputError(
            f"{what} cannot be read: {type(error).__name__}: {error}. Take the file as it was published or saved."
        ) from error


def copy_files(source: Path, target: Path, names: tuple[str, ...]) -> None:
    """Copy those of the files that are there."""
    target.mkdir(exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def token_ids(text_config: PreTrainedConfig) -> dict[str, Any]:
    """Take from a language model's config what `generate` needs: nothing about sampling, which old files mix up."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(text_config, name) for name in names if getattr(text_config, name, None) is not None}


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder, whatever model the folder's config is of.

    Raises:
        FileNotFoundError: if there is none.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES[:2]):
        raise MissingFileError(f"{folder} holds no tokenizer; expected tokenizer.model or tokenizer.json.")
    with tempfile.TemporaryDirectory() as scratch:
        copy_files(folder, Path(scratch), TOKENIZER_FILES)
        with reading(f"the tokenizer of {folder}"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(scratch)
    return tokenizer
