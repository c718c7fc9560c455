"""What the layouts call a weight, in their words and in ours; fusers that lost their scales are refused here.

ours                                     published (LLaVA-1.5, MMFuser)                  llava-hf, vip-llava
model.language_model.X, lm_head          model.X, lm_head                                language_model.model.X, …
model.fuser.X                            model.mm_projector.0.X
model.multi_modal_projector.linear_1     model.mm_projector.0 (with fuser: 1)            multi_modal_projector.linear_1
model.multi_modal_projector.linear_2     model.mm_projector.2 (with fuser: 3)            multi_modal_projector.linear_2
model.vision_tower.backbone.model.X      model.vision_tower.vision_tower.vision_model.X  vision_tower.vision_model.X

ViP-LLaVA's multi_modal_projector.projector_layernorm is model.fuser.norm, of the fuser `concat`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from layerfuse.errors import InputError
from layerfuse.fusers.mmfuser import from_published_state_dict, to_published_state_dict

from .tensors import StoredTensor

__all__ = [
    "BACKBONE",
    "CONCAT_NORM",
    "connector_to_published",
    "from_llava_hf",
    "from_published",
    "has_published_fuser",
    "our_connector",
    "to_llava_hf",
    "to_published",
]

BACKBONE = "model.vision_tower.backbone.model."
"""Prefix of a vision model's weights in ours; the layouts' names behind it are those of transformers."""
_FUSER, _PROJECTOR, _INJECTION = "model.fuser.", "model.multi_modal_projector.", "model.injection."
CONCAT_NORM = f"{_FUSER}norm."
"""Prefix of the norm of `concat`, which ViP-LLaVA's projector begins with."""
_NEWLINE = "model.image_newline"
_PUBLISHED_TOWER = "model.vision_tower.vision_tower.vision_model."
# Positions of the two linear layers in the published projector, a list of modules.
_LINEARS = {True: {"1": "linear_1", "3": "linear_2"}, False: {"0": "linear_1", "2": "linear_2"}}
# Tables that models compute themselves and that old versions of transformers stored.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|embeddings\.position_ids$")
_PUBLISHED_RULES = (
    (re.compile(r"^model\.(?=(?:embed_tokens|layers|norm)\.)"), "model.language_model."),
    (re.compile(r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?"), BACKBONE),
)
# Every way in which versions of transformers wrote them.
_LLAVA_HF_RULES = (
    (re.compile(r"^(?:model\.)?language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^(?:language_model\.model|model\.language_model)\."), "model.language_model."),
    (re.compile(r"^(?:model\.)?vision_tower\.(?:vision_model\.)?"), BACKBONE),
    (re.compile(r"^(?:model\.)?multi_modal_projector\.projector_layernorm\."), CONCAT_NORM),
    (re.compile(r"^multi_modal_projector\."), _PROJECTOR),
)
_SCALES = (f"{_FUSER}output_scale.scale", f"{_FUSER}self_scale.scale")
# All zero in a new block, and moved only by gradients that came through the scales.
_START_AT_ZERO = tuple(
    f"{_FUSER}{attention}.{layer}"
    for attention in ("cross_attn", "self_attn")
    for layer in ("sampling_offsets.weight", "attention_weights.weight", "attention_weights.bias")
)


def has_published_fuser(names: Iterable[str]) -> bool:
    """Whether the published projector begins with a fuser."""
    return any(re.search(r"mm_projector\.0\.(?!(?:weight|bias)$)", name) for name in names)


def from_published(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors of a whole published checkpoint under our names; one without a rule keeps its name.

    Raises:
        ValueError: if the fuser's scales are missing, renamed, or those of a broken load.
    """
    connector = {name: tensor for name, tensor in tensors.items() if "mm_projector." in name}
    rest = {name: tensor for name, tensor in tensors.items() if name not in connector}
    return _apply(_PUBLISHED_RULES, rest) | _connector_from_published(connector)


def from_llava_hf(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors of transformers' LLaVA or VipLlava, as any of its versions names them, under our names."""
    return _apply(_LLAVA_HF_RULES, tensors)


def _apply(
    rules: Iterable[tuple[re.Pattern[str], str]], tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    renamed: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if _COMPUTED.search(name):
            continue
        ours = name
        for pattern, prefix in rules:
            ours, count = pattern.subn(prefix, name)
            if count:
                break
        if ours in renamed:
            raise InputError(f"two weights stand for {ours}, one of them {name}; keep one layout per checkpoint.")
        renamed[ours] = tensor
    return renamed


def _connector_from_published(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Projector, and the fuser if there is one, under our names, from `mm_projector.*`, whatever stands before that."""
    rest = {name.partition("mm_projector.")[2]: tensor for name, tensor in tensors.items()}
    fused = has_published_fuser(tensors)
    ours = {}
    if fused:
        block = {name[2:]: rest.pop(name) for name in list(rest) if name.startswith("0.")}
        ours = {_FUSER + name: tensor for name, tensor in from_published_state_dict(block).items()}
        _check_scales(ours)
    for place, linear in _LINEARS[fused].items():
        for kind in ("weight", "bias"):
            if f"{place}.{kind}" in rest:
                ours[f"{_PROJECTOR}{linear}.{kind}"] = rest.pop(f"{place}.{kind}")
    if rest:
        raise InputError(
            f"the published projector has parts that mlp2x_gelu {'behind a fuser ' if fused else ''}does not have: "
            f"{', '.join(f'mm_projector.{name}' for name in sorted(rest))}. Only mlp2x_gelu can be converted."
        )
    return ours


def our_connector(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors of fuser and projector under our names, out of a connector's file or a checkpoint of any layout.

    Raises:
        ValueError: if a published fuser's scales are missing, renamed, or those of a broken load, or a name in the
            published projector is unknown.
    """
    published = {name: tensor for name, tensor in tensors.items() if "mm_projector." in name}
    if published:
        return _connector_from_published(published)
    ours = from_llava_hf(tensors)
    return {
        name: tensor for name, tensor in ours.items() if name.startswith((_FUSER, _PROJECTOR, _INJECTION, _NEWLINE))
    }


def _check_scales(ours: Mapping[str, StoredTensor]) -> None:
    scales = [ours[name].read() for name in _SCALES]
    if not all(bool(scale.isfinite().all()) for scale in scales):
        raise InputError(
            "the fuser's scales gamma1 and gamma2 are not finite: memory that was never written. The published code "
            "loses them when it loads a checkpoint and saves it again; convert the files that the training wrote."
        )
    if bool(scales[0].any()):
        return
    trained = [name for name in (_SCALES[1], *_START_AT_ZERO) if bool(ours[name].read().any())]
    if trained:
        moved = ", ".join(name.removeprefix(_FUSER) for name in trained)
        raise InputError(
            f"the fuser's scale gamma1 is zero everywhere although the fuser was trained ({moved} moved). That is what "
            "the published code leaves when it loads a checkpoint and saves it again: the fuser would do nothing. "
            "Convert the files that the training wrote."
        )


def to_published(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Our tensors under the published names, language model first, as the published code saves them.

    Those of the vision model are as transformers holds them, or left out.
    """
    published, connector, tower = {}, {}, {}
    for name, tensor in tensors.items():
        if name.startswith(BACKBONE):
            tower[_PUBLISHED_TOWER + name.removeprefix(BACKBONE)] = tensor
        elif name.startswith((_FUSER, _PROJECTOR)):
            connector[name] = tensor
        else:
            published[name.replace("model.language_model.", "model.", 1)] = tensor
    return published | tower | connector_to_published(connector)


def connector_to_published(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Our fuser and projector as the published stage 1 saves them; a ValueError if that has no such parts."""
    if any(name.startswith(_INJECTION) for name in tensors):
        raise InputError(
            "the connector has mergers of layer injection, which the published code does not know; keep our own layout."
        )
    if _NEWLINE in tensors:
        raise InputError(
            "the connector has the newline of tiles (image layout 'anyres'), which the published code of LLaVA-1.5 "
            "does not know; keep our own layout."
        )
    fuser = {name.removeprefix(_FUSER): tensor for name, tensor in tensors.items() if name.startswith(_FUSER)}
    theirs = to_published_state_dict(fuser) if fuser else {}
    published = {f"model.mm_projector.0.{name}": tensor for name, tensor in theirs.items()}
    for place, linear in _LINEARS[bool(fuser)].items():
        for kind in ("weight", "bias"):
            published[f"model.mm_projector.{place}.{kind}"] = tensors[f"{_PROJECTOR}{linear}.{kind}"]
    return published


def to_llava_hf(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Our tensors as checkpoints of llava-hf on the hub name them, which every version of transformers reads."""
    prefixes = {
        BACKBONE: "vision_tower.vision_model.",
        CONCAT_NORM: "multi_modal_projector.projector_layernorm.",
        _PROJECTOR: "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    renamed = {}
    for name, tensor in tensors.items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        renamed[prefixes[prefix] + name.removeprefix(prefix)] = tensor
    return renamed
