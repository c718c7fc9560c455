"""Tokenizer files without what we added: no `<image>`, no token behind the language model's own vocabulary."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .content import TOKENIZER_FILES, Content, copy_files
from .tensors import read_json, write_json

__all__ = ["write_plain_tokenizer"]

_log = logging.getLogger(__name__)

# Keys that hold a token, or several.
_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens", "extra_special_tokens")
# What only our processor, and today's transformers, write.
_NOT_THEIRS = ("processor_class", "image_token", "backend", "is_local", "local_files_only")


def write_plain_tokenizer(content: Content, folder: Path, vocabulary: int, *, as_it_came: bool) -> None:
    """Write the tokenizer of a published checkpoint.

    Args:
        content: has the tokenizer.
        folder: where its files go.
        vocabulary: tokens with this id or a larger one are left out.
        as_it_came: the origin's files are published ones already.
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
