"""The one place where a model is put together: of ready parts, or as a recipe describes it, on any device."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from integrations.llava.config import InjectionConfig, ModelConfig, StageConfig
from integrations.llava.image_layout import FixedLayout, ImageLayout
from integrations.llava.prompts import Template, find_template
from layerfuse.backbones import AnyBackbone
from layerfuse.encoder import check_fuser_fits
from layerfuse.errors import InputError, UserError
from layerfuse.fusers import Fuser

from .configuration import FusedLlavaConfig, LayerfuseVisionConfig
from .generation import forbid_token
from .injection import resolved_injection
from .language_head import HeadSettings, decoder_of, head_settings
from .model import FusedLlavaForConditionalGeneration, ReadyParts
from .parts import count_parameters, forbid_uncapped_attention, loses_cap
from .processing import add_image_token
from .quantization import Quantization, keep_unpackable, quantization_config
from .staging import fit_to_stage, language_dtype
from .tiling import check_layout, recipe_layout
from .vision import build_vision

__all__ = [
    "Assembled",
    "LanguageFiles",
    "assemble",
    "build_model",
    "build_recipe_model",
    "checkpoint_activations",
    "explained_loading",
    "read_language_files",
]

_ATEN = torch.ops.aten
# Operations of a block whose results are kept by selective checkpointing.
_COSTLY = (
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
)


@dataclass(frozen=True)
class LanguageFiles:
    """Config and tokenizer of a recipe's language model, read before its weights are.

    Attributes:
        image_token_id: id of `<image>`.
        tokenizer: with `<image>`; None where there is none at hand.
        described: whether the config is the recipe's `llm_architecture` rather than a file of the language model.
    """

    config: PreTrainedConfig
    image_token_id: int
    tokenizer: PreTrainedTokenizerBase | None
    described: bool


@dataclass(frozen=True)
class Assembled:
    """A model, and what belongs to it.

    Attributes:
        tokenizer: with `<image>`.
        image_token_id: id of that token.
        template: how the stage that it was assembled for writes prompts; None without a stage.
    """

    model: FusedLlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    template: Template | None = None

    @property
    def counts(self) -> Mapping[str, Mapping[str, int]]:
        """Per part, its number of trainable and of frozen parameters."""
        return count_parameters(self.model)


def assemble(
    config: ModelConfig, stage: StageConfig | None = None, *, quantized: bool = True, seed: int | None = None
) -> Assembled:
    """Read what a recipe names, and build its model; arguments and errors are those of `build_recipe_model`."""
    files = read_language_files(config)
    assert files.tokenizer is not None
    model = build_recipe_model(config, files, stage, quantized=quantized, seed=seed)
    template = None if stage is None else find_template(stage.template, files.tokenizer)
    return Assembled(model, files.tokenizer, files.image_token_id, template)


def read_language_files(config: ModelConfig, *, offline: bool = False) -> LanguageFiles:
    """Read config and tokenizer of a recipe's language model, once for all its stages.

    Nothing is downloaded with `offline`: where there is no config the recipe's description does, and without a
    tokenizer the image token comes behind the vocabulary, as with Vicuna.

    Raises:
        ValueError: naming the recipe's key, if there is no config or tokenizer, or the tokenizer has more tokens than
            the language model.
    """
    name, where = config.tokenizer or config.llm, {"local_files_only": offline}
    language, tokenizer = None, None
    if config.llm_pretrained:
        with suppress(OSError) if offline else explained_loading(f"the language model {config.llm}", "model.llm"):
            language = AutoConfig.from_pretrained(config.llm, **where)
    if isinstance(language, LlavaConfig):
        raise InputError(
            f"model.llm is {config.llm}, a whole model of images and text, of which a recipe wants the language model "
            "alone; go on from the model as it is: --from (model.checkpoint)."
        )
    described = language is None
    if language is None:
        language = _described(config)
    # A folder without the tokenizer's files is a ValueError.
    missing = suppress(OSError, ValueError)
    with missing if offline else explained_loading(f"the tokenizer of {name}", "model.tokenizer, model.llm"):
        # Else the config is read a second time for the tokenizer's class.
        known = {} if described or name != config.llm else {"config": language}
        tokenizer = AutoTokenizer.from_pretrained(name, **known, **where)
    vocabulary: Any = getattr(language.get_text_config(), "vocab_size", None)
    if tokenizer is None:
        return LanguageFiles(language, vocabulary, None, described)
    # What a config without this number lacks besides is said where the model is built.
    if isinstance(vocabulary, int) and len(tokenizer) > vocabulary:
        raise InputError(
            f"the tokenizer of {name} has {len(tokenizer)} tokens, but the language model has embeddings for "
            f"{vocabulary}; set model.tokenizer, or vocab_size in model.llm_architecture."
        )
    return LanguageFiles(language, add_image_token(tokenizer), tokenizer, described)


def build_recipe_model(
    config: ModelConfig,
    files: LanguageFiles,
    stage: StageConfig | None = None,
    *,
    device: str | torch.device | None = None,
    quantized: bool = True,
    seed: int | None = None,
) -> FusedLlavaForConditionalGeneration:
    """Build the model that a recipe describes: adapters added, parts frozen, each in its precision.

    On the device "meta" nothing is allocated, loaded or quantised. Trained parameters are float32; frozen ones have the
    type the stage computes in.

    Args:
        config: names the parts.
        files: of its language model.
        stage: says what learns, and how precisely; None for all parts, in float32.
        device: where it is built; None for torch's default device.
        quantized: store a quantised stage's language model so; False to merge adapters into whole weights.
        seed: of parts that are not loaded. A run gives all its stages the same one: what is random and frozen has to be
            the same in each. Adapters, which only this stage has, come from the stage's own seed. None: as the random
            state stands.

    Raises:
        ValueError: if a name, layer or option is not possible.
        ImportError: if adapters or quantised weights are asked for and their package is not installed.
    """
    from transformers import set_seed  # lies beside what imports peft, and that bitsandbytes: seconds

    real = device is None or torch.device(device).type != "meta"
    lora = stage.lora if stage is not None and stage.lora.rank else None
    with nullcontext() if device is None else torch.device(device):
        if seed is not None:
            set_seed(seed)
        width = getattr(files.config.get_text_config(), "hidden_size", None)
        backbone, fuser = build_vision(config, width, pretrained=real and config.backbone_pretrained)
        quantize = lora.quantize if lora is not None and real and quantized else "none"
        dtype = language_dtype(stage)
        llm = _language_model(config, files.config, dtype, quantize, pretrained=real and config.llm_pretrained)
        model = build_model(
            backbone,
            fuser,
            llm,
            image_token_id=files.image_token_id,
            dtype=torch.float32,
            layout=recipe_layout(config, backbone, fuser, files.image_token_id),
            injection=config.injection,
        )
        if stage is not None:
            fit_to_stage(model, stage, seed=None if seed is None else stage.seed)
    return model


def build_model(
    backbone: AnyBackbone,
    fuser: Fuser,
    llm: PreTrainedModel,
    *,
    image_token_id: int,
    prompt_template: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    layout: ImageLayout | None = None,
    head: Mapping[str, Any] | None = None,
    injection: InjectionConfig | None = None,
) -> FusedLlavaForConditionalGeneration:
    """Put a model together from ready parts; their modules are used, not copied.

    The projector is new. The language model's embedding grows if it has no row for the image token.

    Args:
        backbone: taps as many layers as the fuser takes, and behind them those that are only injected.
        fuser: its tokens are projected.
        llm: a causal language model of transformers.
        image_token_id: the tokenizer's id of `<image>`.
        prompt_template: stored with the checkpoint.
        dtype: of backbone, fuser and projector; None for the language model's.
        layout: how many tokens an image takes; if None, the fuser's for an image of the backbone's size, always.
        head: fields of `HeadSettings`, where the whole model computes logits in another way than the language model's
            class where it stands alone; then the head is a new layer.
        injection: layers that are also added inside the language model, through new mergers that start at zero.

    Raises:
        ValueError: if the fuser does not fit the backbone or the layout, layers cannot be injected like that, or the
            language model computes its logits in a way that is not known here.
    """
    decoder = decoder_of(llm)
    injection = resolved_injection(injection, backbone, fuser, decoder or llm)
    if injection is None:
        check_fuser_fits(backbone, fuser)
    if loses_cap(llm.config, llm.config._attn_implementation):
        raise InputError(
            f"{type(llm).__name__} caps its attention scores, and attn_implementation='sdpa' leaves the cap out "
            "without a word in this version of transformers; load it with attn_implementation='eager', or take "
            "transformers>=5.21."
        )
    tried = head_settings(llm)
    settings = tried if head is None else HeadSettings(**head)
    embedding: Any = llm.get_input_embeddings()
    if image_token_id >= embedding.num_embeddings:
        llm.resize_token_embeddings(image_token_id + 1, mean_resizing=False)
    attention = llm.config._attn_implementation
    vision = LayerfuseVisionConfig(
        backbone=backbone.config, hidden_size=max(backbone.map_channels), image_size=list(backbone.image_size)
    )
    if layout is None:
        layout = FixedLayout(image_token_id, fuser.num_tokens(backbone.grids()[: fuser.num_layers]))
    check_layout(layout, backbone, fuser)
    config = FusedLlavaConfig(
        vision_config=vision,
        text_config=llm.config,
        image_token_index=image_token_id,
        image_seq_length=layout.num_tokens(),
        image_layout=layout.config,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        fuser=fuser.config,
        head=asdict(settings) if settings.bias or settings.finish else None,
        injection=None if injection is None else asdict(injection),
        prompt_template=prompt_template,
        tie_word_embeddings=bool(llm.config.tie_word_embeddings),
    )
    assert decoder is not None  # head_settings has used it
    with torch.device(llm.device):
        model = FusedLlavaForConditionalGeneration(config, ReadyParts(backbone, fuser, decoder))
    if settings == tried:
        model.set_output_embeddings(llm.get_output_embeddings())
    model.generation_config = deepcopy(llm.generation_config)
    forbid_token(model.generation_config, image_token_id)
    # The new config made every part forget its attention implementation; some, such as BLOOM, refuse to be told by
    # `set_attn_implementation`, and would go on without a causal mask.
    llm.config._attn_implementation = attention
    # Not the language model: its rotary table has to stay float32.
    inner = model.model
    for part in (inner.vision_tower, inner.fuser, inner.multi_modal_projector, inner.injection):
        if part is not None:
            part.to(dtype or llm.dtype)
    if inner.image_newline is not None:
        inner.image_newline.data = inner.image_newline.to(dtype or llm.dtype)
    return model


def _language_model(
    config: ModelConfig, architecture: PreTrainedConfig, dtype: torch.dtype, quantize: Quantization, *, pretrained: bool
) -> PreTrainedModel:
    quantization = quantization_config(quantize, dtype)
    if quantization is not None and not pretrained:
        raise InputError("quantised weights need a pretrained language model; set model.llm_pretrained to true.")
    forbid_uncapped_attention(architecture)
    how = {"dtype": dtype, "attn_implementation": config.attention}
    model: PreTrainedModel
    keys = "model.llm, model.attention" if pretrained else "model.attention, model.llm_architecture"
    with explained_loading(f"the language model {config.llm}", keys):
        if pretrained:
            how |= {"config": architecture, "quantization_config": quantization}
            model = AutoModelForCausalLM.from_pretrained(config.llm, **how)
        else:
            model = AutoModelForCausalLM.from_config(architecture, **how)
    keep_unpackable(model)
    return model


def _described(config: ModelConfig) -> PreTrainedConfig:
    if "model_type" not in config.llm_architecture:
        raise InputError(
            f"{config.llm} is not to be loaded, or cannot be: neither a folder nor in the hub's cache. So "
            "model.llm_architecture has to describe it: model_type, hidden_size, num_hidden_layers, … as transformers "
            "names them."
        )
    with explained_loading(f"the language model that describes {config.llm}", "model.llm_architecture"):
        described: PreTrainedConfig = AutoConfig.for_model(**config.llm_architecture)
    return described


@contextmanager
def explained_loading(what: str, keys: str) -> Iterator[None]:
    """Say which key of the recipe is at fault where transformers only says what it did not find."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        advice = " Try `--model.attention eager`." if "attn_implementation" in str(error) else ""
        raise InputError(f"{what} cannot be built or loaded (see {keys}): {error}{advice}") from error
    except (EOFError, SafetensorError, pickle.UnpicklingError) as error:  # torch advises to read such a file as code
        raise InputError(
            f"{what} cannot be loaded (see {keys}): its weights are no whole file of tensors ({type(error).__name__}); "
            "download them again, as safetensors."
        ) from error


def checkpoint_activations(model: FusedLlavaForConditionalGeneration, *, selective: bool = False) -> None:
    """Let the language model's blocks compute their activations again in the backward pass, to save memory.

    With `selective`, results of linear layers and of attention (but for eager attention, whose scores would be kept,
    too) stay, and what lies between them is computed again: norms, rotations, activation functions.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if selective:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, list(_COSTLY))
    # transformers 5.23 renamed it; 5.17 knows only the old name.
    switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{switch}_checkpointing_enable")(options)
