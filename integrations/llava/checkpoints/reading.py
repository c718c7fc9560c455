"""Read a checkpoint of any layout; files tell the layout, not their names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from integrations.llava.modeling import FusedLlavaConfig
from layerfuse.errors import InputError, MissingFileError
from layerfuse.files import explain_missing_config

from .content import KEPT_FILES, Content, Options
from .key_maps import has_published_fuser
from .layouts.layerfuse import OWN, read_own
from .layouts.llava import PUBLISHED, read_published
from .layouts.llava_hf import LLAVA_HF, read_llava_hf
from .layouts.llava_lora import is_adapted, trained_along
from .layouts.vip_llava import VIP_LLAVA, read_vip_llava
from .tensors import CONFIG_FILE, read_json, stored_model

__all__ = ["LAYOUTS", "layout_of", "read_checkpoint", "read_config"]

_log = logging.getLogger(__name__)

LAYOUTS = (OWN, *PUBLISHED, LLAVA_HF, VIP_LLAVA)
"""Ours; MMFuser's; LLaVA-1.5's, which is the former without a fuser; those of transformers' LLaVA and VipLlava."""


def layout_of(folder: str | Path) -> str:
    """One of `LAYOUTS`: that of a checkpoint, by what its files hold, never by what the folder is called.

    Raises:
        FileNotFoundError: if the folder holds no config or no weights.
        ValueError: if it holds another kind of model.
    """
    folder = Path(folder)
    config = read_config(folder)
    if config.get("model_type") == FusedLlavaConfig.model_type:
        return OWN
    if "mm_vision_tower" in config:
        stored = trained_along(folder) if is_adapted(folder) else stored_model(folder)
        return PUBLISHED[0] if has_published_fuser(stored) else PUBLISHED[1]
    if config.get("model_type") == "llava" and "text_config" in config:
        return LLAVA_HF
    if config.get("model_type") == "vipllava" and "text_config" in config:
        return VIP_LLAVA
    raise InputError(
        f"{folder} holds a {config.get('model_type')!r} model of {config.get('architectures')}, which is none of "
        f"{', '.join(LAYOUTS)}: its config is no {FusedLlavaConfig.model_type}, names no mm_vision_tower, and is no "
        "transformers LLaVA's or VipLlava's."
    )


def read_checkpoint(source: Path, options: Options) -> Content:
    """Read a checkpoint of any layout, its weights still in their files.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if it cannot be read as what its files say it is.
    """
    found, config = layout_of(source), read_config(source)
    _log.info("%s has the layout %s", source, found)
    # A library that reads half of a file fails anywhere.
    for name in KEPT_FILES:
        if name.endswith(".json") and (source / name).is_file():
            read_json(source / name)
    if found == OWN:
        return read_own(source, options)
    if found == LLAVA_HF:
        return read_llava_hf(source, config, options)
    if found == VIP_LLAVA:
        return read_vip_llava(source, config, options)
    return read_published(source, config, options)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a checkpoint; a FileNotFoundError if there is none."""
    if not (folder / CONFIG_FILE).is_file():
        raise MissingFileError(
            f"{folder} holds no {CONFIG_FILE}; give the folder of a checkpoint.{explain_missing_config(folder)}"
        )
    return read_json(folder / CONFIG_FILE)
