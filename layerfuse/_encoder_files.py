"""Files of a saved encoder: fetched if need be, and their config read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from layerfuse._hub import FETCH_ERRORS, why_not_fetched
from layerfuse.errors import InputError, MissingFileError
from layerfuse.files import explain_missing_config

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "fetch_encoder", "read_encoder_config"]

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def fetch_encoder(
    folder_or_name: str | Path,
    *,
    revision: str | None,
    cache_dir: str | Path | None,
    force_download: bool,
    local_files_only: bool,
    token: str | bool | None,
) -> Path:
    """Return the folder of an encoder: the one given, or that into which a name on the hub was fetched.

    The arguments are those of huggingface_hub's `snapshot_download`.

    Raises:
        FileNotFoundError: if there is neither folder nor repository.
    """
    if Path(folder_or_name).is_dir():
        return Path(folder_or_name)
    try:
        fetched = snapshot_download(
            str(folder_or_name),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            allow_patterns=[CONFIG_FILE, WEIGHTS_FILE],
        )
        return Path(fetched)
    except (*FETCH_ERRORS, ValueError) as error:
        raise MissingFileError(
            f"{folder_or_name} is no folder, and it could not be fetched from the hub: {why_not_fetched(error)}. Give "
            "a folder written by FusedEncoder.save_pretrained, or the name of a repository."
        ) from error


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
