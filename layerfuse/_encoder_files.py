"""The folder of a saved encoder: the names of its files, and its config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layerfuse.errors import InputError, MissingFileError
from layerfuse.files import explain_missing_config

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "read_encoder_config"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def read_encoder_config(folder: Path) -> dict[str, Any]:
    """Return the configs of ``backbone`` and ``fuser`` from a folder that `FusedEncoder.save_pretrained` wrote.

    Raises:
        FileNotFoundError: if config or weights are not there.
        ValueError: if the config is damaged, or of something else.
    """
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(
            f"{folder} holds no {' and no '.join(missing)}; give a folder written by FusedEncoder.save_pretrained."
            f"{explain_missing_config(folder)}"
        )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{folder / CONFIG_FILE} is no valid JSON ({error}); write or download it anew.") from error
    if not isinstance(config, dict) or set(config) != {"backbone", "fuser"}:
        keys = sorted(config) if isinstance(config, dict) else type(config).__name__
        raise InputError(f"{folder / CONFIG_FILE} has the keys {keys}; a FusedEncoder's has 'backbone' and 'fuser'.")
    return config
