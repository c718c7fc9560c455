"""What every layout is brought to before it is written as another: our model, its weights still in their files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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

from integrations.llava.config import InjectionConfig
from integrations.llava.image_layout import ImageLayout
from integrations.llava.modeling import FusedLlavaForConditionalGeneration, build_model, end_answers
from integrations.llava.prompts import Template
from layerfuse.backbones import AnyBackbone, Backbone
from layerfuse.errors import InputError, MissingFileError, UserError
from layerfuse.fusers import Fuser
from layerfuse.preprocessing import AnyPreprocessing, Mode, Preprocessing

from .tensors import StoredTensor, check_fit

__all__ = [
    "KEPT_FILES",
    "TOKENIZER_FILES",
    "Content",
    "Options",
    "Origin",
    "check_weights",
    "copy_files",
    "meta_model",
    "read_tokenizer",
    "reading",
    "refuse_injection",
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

_EMBEDDING, _HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Options:
    """Choices for a conversion, which the files do not say; None leaves them to the files.

    Attributes:
        template: name of the prompt template the model was trained with.
        image_mode: how images are brought to the model's size.
        vision_tower: folder or hub name of the vision model: its weights where the checkpoint has none, its config
            where the checkpoint only names it, and the name that is written where a layout wants one.
        base: folder or hub name of the model that a LoRA checkpoint's adapters were trained on.
    """

    template: str | None = None
    image_mode: Mode | None = None
    vision_tower: str | None = None
    base: str | None = None


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
        elsewhere: other folders that weights were read from.
        generation: settings of `generate`.
    """

    model: FusedLlavaForConditionalGeneration
    tensors: Mapping[str, StoredTensor]
    tokenizer: PreTrainedTokenizerBase
    preprocessing: AnyPreprocessing
    template: Template
    folder: Path
    tail: Mapping[str, StoredTensor] = field(default_factory=dict)
    origin: Origin | None = None
    elsewhere: Sequence[Path] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def backbone(self) -> Backbone:
        """The only backbone, on the meta device; a ValueError if there are several."""
        backbone = self.model.model.vision_tower.backbone
        if not isinstance(backbone, Backbone):
            raise InputError(
                f"the model has {len(backbone.members)} backbones, and the other layouts have a place for one; keep "
                "our own layout, 'layerfuse', which holds this model as it is."
            )
        return backbone

    @property
    def only_preprocessing(self) -> Preprocessing:
        """The preprocessing of the only backbone."""
        prepare, _ = self.preprocessing, self.backbone  # which refuses several
        assert isinstance(prepare, Preprocessing)
        return prepare

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
        """Rows of the language model's embedding without those that were added for images."""
        rows, image = self.tensors[_EMBEDDING].shape[0], self.model.config.image_token_index
        tokens = self.tokenizer.get_vocab()
        behind = {token for token, number in tokens.items() if number > image}
        # `<image>` and what follows it (a padding token, rows that fill up) is no part of the language model.
        return rows if behind - set(self.tokenizer.all_special_tokens) else min(rows, image)


def meta_model(
    backbone: AnyBackbone,
    fuser: Fuser,
    text_config: PreTrainedConfig,
    *,
    image_token_id: int,
    template: Template,
    head: Mapping[str, Any] | None = None,
    layout: ImageLayout | None = None,
    injection: InjectionConfig | None = None,
) -> FusedLlavaForConditionalGeneration:
    """Model on the meta device, as `build_model` assembles it.

    Args:
        backbone: on the meta device.
        fuser: on the meta device.
        text_config: of the language model; its vocabulary grows if it has no row for the image token.
        image_token_id: the tokenizer's id of `<image>`.
        template: how prompts are written.
        head: what the layout's model does beside the product with its head's weight, the fields of `HeadSettings`; the
            language model's class may do another thing where it stands alone.
        layout: as for `build_model`.
        injection: as for `build_model`.
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
            injection=injection,
        )


def refuse_injection(content: Content, layout: str) -> None:
    """Raise a ValueError for a model with layer injection, which no layout but ours has a place for."""
    if content.model.config.injection is not None:
        raise InputError(
            f"the model adds layers of its backbone inside its language model (injection), and the layout {layout!r} "
            "has no place for that; keep our own layout, 'layerfuse', which holds this model as it is."
        )


def check_weights(
    model: FusedLlavaForConditionalGeneration, tensors: Mapping[str, StoredTensor], where: str
) -> dict[str, StoredTensor]:
    """Stored weights, under our names, in the model's order; a head that is tied to the embedding may be left out.

    Raises:
        ValueError: listing missing, unexpected and misshapen weights of `where`, a folder.
    """
    expected = model.state_dict()
    if getattr(model.config.text_config, "tie_word_embeddings", False) and _HEAD not in tensors:
        del expected[_HEAD]
    check_fit(
        expected,
        tensors,
        fault=f"the weights of {where} are not those of the model its config describes (in our names)",
        advice="Check that config and weights belong together",
        most=20,
    )
    return {name: tensors[name] for name in expected}


def with_rows(tensors: Mapping[str, StoredTensor], rows: int) -> dict[str, StoredTensor]:
    """All tensors of a model, embedding and head with another number of rows: new ones are zero, surplus ones are cut.

    A row for the image token is never read: its place in the text is taken by image features, and the head forbids it.
    """

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        cut = tensor[:rows]
        return torch.cat([cut, cut.new_zeros(rows - len(cut), *cut.shape[1:])])

    changed = dict(tensors)
    for name in (_EMBEDDING, _HEAD):
        if name in tensors and tensors[name].shape[0] != rows:
            changed[name] = tensors[name].then(resize, (rows, *tensors[name].shape[1:]))
    return changed


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn a library's error about a file into an InputError; the block calls the library and does nothing else."""
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
    """Copy files; names that the source lacks are passed over."""
    target.mkdir(exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def token_ids(text_config: PreTrainedConfig) -> dict[str, Any]:
    """Settings of `generate` in a language model's config: nothing about sampling, which old files mix up."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(text_config, name) for name in names if getattr(text_config, name, None) is not None}


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Tokenizer of a folder, whatever model its config is of; a FileNotFoundError if there is none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES[:2]):
        raise MissingFileError(f"{folder} holds no tokenizer; expected tokenizer.model or tokenizer.json.")
    with tempfile.TemporaryDirectory() as scratch:
        copy_files(folder, Path(scratch), TOKENIZER_FILES)
        with reading(f"the tokenizer of {folder}"):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(scratch)
    return tokenizer
