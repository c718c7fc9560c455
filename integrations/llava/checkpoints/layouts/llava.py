"""The published layouts: LLaVA-1.5 (haotian-liu/LLaVA) and MMFuser (yuecao0119/MMFuser), which adds the fuser.

The language model's config is flat, with `mm_*` keys for the vision side. The vision model is named, and its weights
may be in the checkpoint or not: the published code ignores them and reads the one that is named. No prompt template
is stored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from integrations.llava.modeling import add_image_token
from integrations.llava.prompts import get_template
from layerfuse.fusers import create_fuser
from layerfuse.preprocessing import Mode

from ..content import (
    TOKENIZER_FILES,
    Content,
    Options,
    Origin,
    check_weights,
    copy_files,
    meta_model,
    read_tokenizer,
    reading,
    refuse_injection,
    token_ids,
    with_rows,
)
from ..key_maps import BACKBONE, from_published, has_published_fuser, to_published
from ..tensors import CONFIG_FILE, read_json, stored_model, write_json, write_sharded
from ..vision_weights import backbone_like, check_tower, find_tower, split_tail, tower_tensors, vision_tensors_of
from .llava_config import check_published_config, llama_config, published_config, published_layers
from .llava_lora import adapted_model, find_base, is_adapted

__all__ = ["PUBLISHED", "read_published", "write_published"]

_log = logging.getLogger(__name__)

PUBLISHED = ("mmfuser", "llava")
"""Names of the published layouts."""
_MODES: Mapping[str, Mode] = {"pad": "pad", "square": "crop"}
# The published loader looks for the fuser's scales in model-00003-of-00003 and model-00006-of-00006, nowhere else.
_FEW_SHARDS, _MANY_SHARDS, _LARGE = 3, 6, 20 * 2**30
# Keys that hold a token, or several.
_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens", "extra_special_tokens")
# What only our processor, and today's transformers, write.
_NOT_THEIRS = ("processor_class", "image_token", "backend", "is_local", "local_files_only")


def read_published(folder: Path, config: Mapping[str, Any], options: Options) -> Content:
    """Read a published checkpoint, whose `config.json` is `config`; adapters in a LoRA folder are merged.

    Raises:
        FileNotFoundError: if weights or tokenizer are missing.
        ValueError: if it is of a kind that cannot be converted, its fuser lost its scales, or names do not fit.
    """
    check_published_config(config)
    base = find_base(folder, config, options) if is_adapted(folder) else None
    stored = stored_model(folder) if base is None else adapted_model(folder, base)
    fused = has_published_fuser(stored)
    tensors = from_published(stored)
    has_tower = any(name.startswith(BACKBONE) for name in tensors)
    tower = find_tower(options.vision_tower or config["mm_vision_tower"], beside=folder, weights=not has_tower)
    if not has_tower:
        _log.info("the checkpoint holds no vision model; taking it from %s", tower)
        tensors |= tower_tensors(tower)
    backbone = backbone_like(tower, published_layers(config, fused=fused))
    fuser = create_fuser(
        "mmfuser" if fused else "select", in_channels=backbone.embed_dim, num_layers=len(backbone.layers)
    )
    tokenizer = read_tokenizer(base or folder)
    image_token_id = add_image_token(tokenizer)
    if options.template is None:
        _log.info("published checkpoints do not hold their prompt template; taking v1, vicuna's (--template)")
    template = get_template(options.template or "v1")
    with reading(f"the config of {folder}"):
        text_config = LlamaConfig(**llama_config(config))
    model = meta_model(backbone, fuser, text_config, image_token_id=image_token_id, template=template)
    own, tail = split_tail(model, with_rows(tensors, text_config.vocab_size))
    mode = options.image_mode or _MODES[config.get("image_aspect_ratio") or "square"]
    return Content(
        model=model,
        tensors=check_weights(model, own, str(folder)),
        tokenizer=tokenizer,
        preprocessing=replace(backbone.preprocessing, mode=mode),
        template=template,
        folder=base or folder,
        tail=tail,
        # Merged, it goes back as a model of ours would.
        origin=None if base else Origin("mmfuser" if fused else "llava", folder, has_tower, dict(config)),
        elsewhere=(*([folder] if base else []), *([] if has_tower else [tower])),
        generation=token_ids(text_config),
    )


def write_published(content: Content, folder: Path, options: Options, *, fused: bool) -> None:
    """Write a published checkpoint, with a fuser (MMFuser) or without (LLaVA-1.5), into a folder that exists.

    The vision model's weights are written where they came that way; otherwise they are left out, as in the released
    checkpoints, and the published code reads the vision model that is named: in the options, or else by the model's
    origin.

    Raises:
        ValueError: if the published code cannot be given this model; the message says why.
    """
    refuse_injection(content, "mmfuser" if fused else "llava")
    origin = content.origin if content.origin is not None and content.origin.layout in PUBLISHED else None
    config = published_config(content, origin.config if origin else {}, options, fused=fused)
    tensors = with_rows(content.tensors, config["vocab_size"])
    tower = vision_tensors_of(content.backbone, tensors)
    if options.vision_tower is not None or origin is None:
        check_tower(config["mm_vision_tower"], tower, beside=content.folder)
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(BACKBONE)}
    if origin is not None and origin.has_tower:
        rest |= {**tower, **content.tail}
    shards = None
    if fused:
        total = sum(tensor.num_bytes for tensor in rest.values())
        shards = _FEW_SHARDS if total < _LARGE else _MANY_SHARDS
    write_sharded(to_published(rest), folder, num_shards=shards)
    _write_tokenizer(content, folder, config["vocab_size"], as_it_came=origin is not None)
    if origin is not None:
        copy_files(origin.folder, folder, ("generation_config.json",))
    write_json(folder / CONFIG_FILE, dict(sorted(config.items())))
    _log.info("the published code is told the template on its command line: --conv-mode %s", content.template.name)


def _write_tokenizer(content: Content, folder: Path, vocabulary: int, *, as_it_came: bool) -> None:
    """Write tokenizer files without our additions: no `<image>`, no token behind the language model's vocabulary.

    Where the files came from a published checkpoint, they are written as they came.
    """
    source = content.folder if content.origin is None else content.origin.folder
    copy_files(source, folder, TOKENIZER_FILES)
    if not as_it_came:
        added = {token for token, number in content.tokenizer.get_vocab().items() if number >= vocabulary}
        for name in TOKENIZER_FILES[1:]:
            if (folder / name).is_file():
                write_json(folder / name, _without(read_json(folder / name), added))
    if not (folder / "tokenizer.model").is_file():
        _log.warning(
            "%s has no tokenizer.model, which the published code needs; copy it from the language model's own folder",
            source,
        )


def _without(content: dict[str, Any], added: set[str]) -> dict[str, Any]:
    # added_tokens.json is a table of token -> id.
    plain = {key: value for key, value in content.items() if key not in {*added, *_NOT_THEIRS}}
    if "added_tokens" in plain:
        plain["added_tokens"] = [token for token in plain["added_tokens"] if token["content"] not in added]
    if "added_tokens_decoder" in plain:
        decoder = plain["added_tokens_decoder"]
        plain["added_tokens_decoder"] = {key: token for key, token in decoder.items() if token["content"] not in added}
    for key in _TOKEN_KEYS:
        value = plain.get(key)
        if isinstance(value, list):
            plain[key] = [token for token in value if _text(token) not in added]
        elif value is not None and _text(value) in added:
            # The published code pads with the unknown token.
            plain[key] = plain.get("unk_token")
    return plain


def _text(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
