"""The model of a recipe: built from its parts, each part trained or frozen, in the precision it is used in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from integrations.llava.config import PARTS, LoraConfig, ModelConfig, StageConfig
from layerfuse.backbones import Backbone, create_backbone
from layerfuse.errors import InputError, UserError
from layerfuse.fusers import Fuser, create_fuser

from .built_modules import forbid_uncapped_attention
from .model import FusedLlavaForConditionalGeneration, build_model
from .processing import add_image_token
from .quantization import keep_unpackable, quantization_config

__all__ = [
    "Assembled",
    "assemble",
    "assemble_stage",
    "build_on_meta",
    "check_vocabulary",
    "checkpoint_activations",
    "create_vision",
    "described_llm",
    "llm_config",
    "llm_from_config",
    "load_tokenizer",
    "set_trainable",
]


@dataclass(frozen=True)
class Assembled:
    """A model and what belongs to it.

    Attributes:
        model: the model.
        tokenizer: with `<image>`.
        image_token_id: its id.
        counts: per part, its number of trainable and of frozen parameters; empty before a stage has said what learns.
    """

    model: FusedLlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


def assemble(
    config: ModelConfig, *, llm_dtype: torch.dtype = torch.float32, lora: LoraConfig | None = None
) -> Assembled:
    """Build the model that a recipe describes.

    Args:
        config: names the parts.
        llm_dtype: of the language model; the other parts are float32.
        lora: quantises the language model, if it says so; adapters are added later.

    Returns:
        The model on the CPU (a quantised language model where bitsandbytes puts it), everything trainable.

    Raises:
        ValueError: if a name, layer or option is not possible, or tokenizer and language model do not fit.
    """
    backbone, fuser = create_vision(config, pretrained=config.backbone_pretrained)
    tokenizer = load_tokenizer(config)
    llm = _language_model(config, llm_dtype, lora)
    embedding: Any = llm.get_input_embeddings()
    check_vocabulary(config, tokenizer, embedding.num_embeddings)
    image_token_id = add_image_token(tokenizer)
    model = build_model(backbone, fuser, llm, image_token_id=image_token_id, dtype=torch.float32)
    return Assembled(model, tokenizer, image_token_id)


def _language_model(config: ModelConfig, dtype: torch.dtype, lora: LoraConfig | None) -> PreTrainedModel:
    model: PreTrainedModel
    quantized = quantization_config(lora.quantize, dtype) if lora is not None else None
    if config.llm_pretrained:
        architecture = llm_config(config)
        forbid_uncapped_attention(architecture)
        with _loading(f"the language model {config.llm}", "model.llm, model.attention"):
            model = AutoModelForCausalLM.from_pretrained(
                config.llm,
                config=architecture,
                dtype=dtype,
                attn_implementation=config.attention,
                quantization_config=quantized,
            )
        keep_unpackable(model)
        return model
    if quantized is not None:
        raise InputError("quantised weights need a pretrained language model; set model.llm_pretrained to true.")
    return llm_from_config(config, described_llm(config), dtype=dtype)


def llm_from_config(config: ModelConfig, architecture: PreTrainedConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """Build a language model with random weights.

    Args:
        config: names the attention implementation.
        architecture: its own config.
        dtype: of its weights.

    Returns:
        The model, on the device that is the default one.

    Raises:
        ValueError: if transformers cannot build it so.
    """
    forbid_uncapped_attention(architecture)
    with _loading(f"the language model {config.llm}", "model.attention, model.llm_architecture"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            architecture, dtype=dtype, attn_implementation=config.attention
        )
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a recipe.

    Raises:
        ValueError: if there is none; the recipe's key is named.
    """
    name = config.tokenizer or config.llm
    with _loading(f"the tokenizer of {name}", "model.tokenizer, model.llm"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    return tokenizer


def check_vocabulary(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Make sure that every token has an embedding.

    Raises:
        ValueError: if the tokenizer has more tokens than the language model embeddings.
    """
    if len(tokenizer) > vocabulary:
        raise InputError(
            f"the tokenizer of {config.tokenizer or config.llm} has {len(tokenizer)} tokens, but the language model "
            f"has embeddings for {vocabulary}; set model.tokenizer, or vocab_size in model.llm_architecture."
        )


@contextmanager
def _loading(what: str, keys: str) -> Iterator[None]:
    """Say which key of the recipe is at fault where transformers only says what it did not find."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        advice = " Try `--model.attention eager`." if "attn_implementation" in str(error) else ""
        raise InputError(f"{what} cannot be built or loaded (see {keys}): {error}{advice}") from error


def create_vision(config: ModelConfig, *, pretrained: bool) -> tuple[Backbone, Fuser]:
    """Build the backbone of a recipe, and the fuser that fits it.

    Args:
        config: names both.
        pretrained: load the backbone's weights; else they are random.

    Returns:
        Both.

    Raises:
        ValueError: if a name, layer or option is not possible.
    """
    backbone = create_backbone(
        f"{config.family}:{config.backbone}",
        layers=config.layers,
        pretrained=pretrained,
        image_size=config.image_size,
        options=config.backbone_options,
    )
    # Forked, so that runs which differ in nothing but the fuser start from the same projector.
    with torch.random.fork_rng():
        fuser = create_fuser(
            config.fuser, in_channels=backbone.embed_dim, num_layers=len(config.layers), options=config.fuser_options
        )
    return backbone, fuser


def described_llm(config: ModelConfig) -> PreTrainedConfig:
    """Read the language model's config out of the recipe.

    Raises:
        ValueError: if the recipe does not hold it.
    """
    if "model_type" not in config.llm_architecture:
        raise InputError(
            f"{config.llm} is not to be loaded, or cannot be: neither a folder nor in the hub's cache. So "
            "model.llm_architecture has to describe it: model_type, hidden_size, num_hidden_layers, … as transformers "
            "names them."
        )
    with _loading(f"the language model that describes {config.llm}", "model.llm_architecture"):
        described: PreTrainedConfig = AutoConfig.for_model(**config.llm_architecture)
    return described


def llm_config(config: ModelConfig) -> PreTrainedConfig:
    """Find the language model's config: its own, or the one that the recipe describes.

    Args:
        config: names it.

    Returns:
        The config; no weights are read.

    Raises:
        ValueError: if it is nowhere.
    """
    if not config.llm_pretrained:
        return described_llm(config)
    with _loading(f"the language model {config.llm}", "model.llm"):
        found: PreTrainedConfig = AutoConfig.from_pretrained(config.llm)
    return found


def build_on_meta(
    config: ModelConfig, stage: StageConfig, architecture: PreTrainedConfig, *, image_token_id: int
) -> FusedLlavaForConditionalGeneration:
    """Build a recipe's model as a stage trains it, without allocating it.

    Args:
        config: names the parts.
        stage: says which learn, and whether through adapters.
        architecture: the language model's config.
        image_token_id: id of `<image>`.

    Returns:
        The model on the meta device, all in the precision that the stage computes in, not quantised.

    Raises:
        ValueError: if a name, layer or option is not possible.
        ImportError: if adapters are asked for and peft is not installed.
    """
    with torch.device("meta"):
        backbone, fuser = create_vision(config, pretrained=False)
        llm = llm_from_config(config, architecture, dtype=torch.float32)
        model = build_model(backbone, fuser, llm, image_token_id=image_token_id)
        if stage.lora.rank:
            from .lora import add_lora

            add_lora(model, stage.lora)
    set_trainable(model, stage.trainable, adapters_only=stage.lora.rank > 0)
    if stage.precision == "bf16":
        model.bfloat16()
    return model


def assemble_stage(
    config: ModelConfig, stage: StageConfig, *, quantized: bool = True, seed: int | None = None
) -> Assembled:
    """Build the model as a stage trains it: adapters added, parts frozen, each in its precision.

    Args:
        config: names the parts.
        stage: says what learns, and how precisely.
        quantized: store a quantised stage's language model so; False to merge adapters into whole weights.
        seed: of parts that are not loaded. A run gives all its stages the same one: what is random and frozen has to be
            the same in each. Adapters, which only this stage has, come from the stage's own seed. None: as the random
            state stands.

    Returns:
        The model. Trained parameters are float32; frozen ones have the type the stage computes in.

    Raises:
        ValueError: as `assemble`.
    """
    lora = stage.lora if stage.lora.rank else None
    frozen = torch.bfloat16 if stage.precision == "bf16" else torch.float32
    llm_learns = "llm" in stage.trainable and lora is None
    if seed is not None:
        set_seed(seed)
    assembled = assemble(config, llm_dtype=torch.float32 if llm_learns else frozen, lora=lora if quantized else None)
    if seed is not None:
        set_seed(stage.seed)
    model = assembled.model
    if lora is not None:
        from .lora import add_lora

        add_lora(model, lora)
    counts = set_trainable(model, stage.trainable, adapters_only=lora is not None)
    for parameter in model.parameters():
        # Quantised weights are integers.
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else frozen)
    return replace(assembled, counts=counts)


def checkpoint_activations(model: FusedLlavaForConditionalGeneration) -> None:
    """Let the language model's blocks compute their activations again in the backward pass, to save memory."""
    # transformers 5.23 renamed it; 5.17 knows only the old name.
    switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{switch}_checkpointing_enable")({"use_reentrant": False})


def set_trainable(model: nn.Module, parts: Sequence[str], *, adapters_only: bool = False) -> dict[str, dict[str, int]]:
    """Let some parts learn and freeze all others.

    Args:
        model: changed in place.
        parts: names from `PARTS`.
        adapters_only: of the language model, only its LoRA adapters learn.

    Returns:
        Per part, its number of trainable and of frozen parameters.
    """
    counts = {part: {"trainable": 0, "frozen": 0} for part in PARTS}
    for name, parameter in model.named_parameters():
        part = next(part for part, prefixes in PARTS.items() if name.startswith(prefixes))
        learns = part in parts and not (adapters_only and part == "llm" and ".lora_" not in name)
        parameter.requires_grad_(learns)
        counts[part]["trainable" if learns else "frozen"] += parameter.numel()
    return counts
