"""The published config: a Llama's, flat, with keys for the vision side that begin with `mm_`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from integrations.llava.modeling import describe_head
from layerfuse.errors import InputError

from ..content import Content, Options

__all__ = ["check_fuser", "check_published_config", "llama_config", "published_config", "published_layers"]

# The published block fixes these: four value layers and a query behind them, 16 heads, 4 points.
_NUM_LAYERS = 5
_FUSER = {"num_heads": 16, "num_points": 4, "norm_eps": 1e-6}
_LLAMA_FIELDS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "pretraining_tp",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)
# Values that can be converted; the first is what the published code takes where the key is absent.
_ALLOWED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("llava_llama", "llava"),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "mm_patch_merge_type": ("flat",),
    "image_aspect_ratio": ("square", "pad", None),
}
# Of scaled rotary embeddings, the published code's transformers knows these.
_ROPES = ("default", "linear", "dynamic")
_ASPECTS = {"pad": "pad", "crop": "square"}
_FIXED: Mapping[str, Any] = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava_llama",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "use_mm_proj": True,
}


def check_published_config(config: Mapping[str, Any]) -> None:
    """Refuse a config that has no counterpart here; the ValueError lists keys, values, and those that are possible."""
    faults = [
        f"{key} is {config[key]!r}, can be {' or '.join(map(repr, allowed))}"
        for key, allowed in _ALLOWED.items()
        if key in config and config[key] not in allowed
    ]
    if not isinstance(config.get("mm_vision_tower"), str):
        faults.append(f"mm_vision_tower is {config.get('mm_vision_tower')!r}, can be a name or folder")
    if faults:
        raise InputError(
            f"this checkpoint is none of LLaVA-1.5 or MMFuser with a Llama: {'; '.join(faults)}. Only those can be "
            "converted."
        )


def published_layers(config: Mapping[str, Any], *, fused: bool) -> tuple[int, ...]:
    """Tapped layers: the published fuser takes the first four as values and the last as query, and ignores others.

    Raises:
        ValueError: if there are too few layers for the fuser, or several without one.
    """
    given = config.get("mm_vision_select_layer", -2)
    layers = tuple(given) if isinstance(given, list | tuple) else (given,)
    numbers = all(isinstance(layer, int) for layer in layers)
    if not numbers or (len(layers) < _NUM_LAYERS if fused else len(layers) != 1):
        wanted = f"{_NUM_LAYERS} layers, four values and the query" if fused else "one layer, since there is no fuser"
        raise InputError(f"mm_vision_select_layer is {given!r}; expected {wanted}.")
    return (*layers[: _NUM_LAYERS - 1], layers[-1]) if fused else layers


def llama_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of LlamaConfig in a published config."""
    scaling = dict(config.get("rope_scaling") or {})
    rope = {"rope_type": scaling.pop("rope_type", scaling.pop("type", "default")), **scaling}
    fields = {key: config[key] for key in _LLAMA_FIELDS if key in config}
    return {**fields, "rope_parameters": {"rope_theta": config.get("rope_theta", 10000.0), **rope}}


def published_config(content: Content, earlier: Mapping[str, Any], options: Options, *, fused: bool) -> dict[str, Any]:
    """Published config of a model, over the one that it had in a published layout, if it comes from one.

    The vision model is named by the options, or else by the earlier config.

    Raises:
        ValueError: if the published code has no such model, or the vision model has no name.
    """
    check_fuser(content.fuser.config, fused=fused)
    text = content.model.config.get_text_config().to_dict()
    rope = dict(text["rope_parameters"])
    _check_llama(text, rope, content.model.config.head)
    if content.only_preprocessing.mode not in _ASPECTS:
        raise InputError(
            f"images are prepared by {content.only_preprocessing.mode!r}; the published code can pad and crop."
        )
    tower = options.vision_tower or earlier.get("mm_vision_tower")
    if not tower or "clip" not in tower.lower():
        raise InputError(
            f"the vision model is called {tower!r}; the published code reads it from there, and takes only names with "
            "'clip' in them. Give its hub name or folder: --vision-tower openai/clip-vit-large-patch14-336"
        )
    backbone = content.backbone
    layers = [layer - backbone.num_blocks - 1 for layer in backbone.layers]
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    rope.pop("type", None)
    own = {key: text[key] for key in _LLAMA_FIELDS if text.get(key) is not None or key in earlier}
    return {
        **_FIXED,
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        **earlier,
        **own,
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else {"type": kind, **rope},
        "vocab_size": earlier.get("vocab_size", content.own_vocabulary),
        "torch_dtype": str(content.dtype).removeprefix("torch."),
        "mm_hidden_size": backbone.embed_dim,
        "mm_vision_select_layer": layers if fused else layers[0],
        "mm_vision_tower": tower,
        "image_aspect_ratio": _ASPECTS[content.only_preprocessing.mode],
    }


def check_fuser(config: Mapping[str, Any], *, fused: bool) -> None:
    """Refuse a fuser (`Fuser.config`) that the published layout has no place for; the message says which fit."""
    name, num_layers = config["name"], config["num_layers"]
    if not fused:
        if name != "select" or num_layers != 1:
            raise InputError(
                f"the model has the fuser {name!r} over {num_layers} layers, and LLaVA-1.5 has no place for a fuser: "
                "only 'select' on one layer fits. An MMFuser can be written in the layout 'mmfuser'."
            )
        return
    other = {key: config.get(key) for key, value in _FUSER.items() if config.get(key) != value}
    if name != "mmfuser" or num_layers != _NUM_LAYERS or other or config["query_index"] not in (-1, num_layers - 1):
        settings = {key: value for key, value in config.items() if key not in ("name", "num_layers", "in_channels")}
        raise InputError(
            f"the model has the fuser {name!r} over {num_layers} layers with {settings or 'no settings'}; the "
            f"published code has only 'mmfuser' over {_NUM_LAYERS} layers, the last one the query, with {dict(_FUSER)}."
        )


def _check_llama(text: Mapping[str, Any], rope: Mapping[str, Any], head: Mapping[str, Any] | None) -> None:
    faults = []
    if text.get("model_type") != "llama":
        faults.append(f"is a {text.get('model_type')!r}")
    if text.get("head_dim") not in (None, text["hidden_size"] // text["num_attention_heads"]):
        faults.append(f"has heads of width {text['head_dim']}")
    if text.get("mlp_bias"):
        faults.append("has biases in its MLP")
    if rope["rope_type"] not in _ROPES:
        faults.append(f"has rotary embeddings of type {rope['rope_type']!r}")
    if head is not None:
        faults.append(describe_head(head))
    if faults:
        raise InputError(
            f"the language model {', '.join(faults)}; the published code has only plain Llamas. Keep the layout "
            "'layerfuse', which holds this model as it is."
        )
