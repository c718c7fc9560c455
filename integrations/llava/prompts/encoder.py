"""Texts as ids, piece by piece: no control token is read out of a text, and a long text need not be tokenised whole."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, Literal

import tokenizers

from layerfuse.errors import InputError

from .templates import BOS, EOS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["LONG_TEXT", "TextEncoder"]

LONG_TEXT = 2**16
"""Characters up to which a text is always tokenised whole."""

# Of a longer text, so many characters a token are looked at first, and more if they do not suffice.
_CHARACTERS = 8
_BETWEEN_WORDS = re.compile(r"[^\W_] [^\W_]")
# A blank, as tokenizers spell it, behind something else.
_REACHES_OVER = re.compile("[^ \u2581\u0120][ \u2581\u0120]")


class TextEncoder:
    """Turns text into ids piece by piece: no control token is read out of it, no beginning is added unasked.

    Args:
        tokenizer: a fast tokenizer; it is read, never changed.
        control_tokens: added tokens that texts never become, beside the tokenizer's special ones: a template's.

    Raises:
        ValueError: if the tokenizer has no fast implementation or no end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control_tokens: Collection[str] = ()) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise InputError(
                f"{type(tokenizer).__name__} has no fast implementation; save the tokenizer with a tokenizer.json."
            )
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no eos_token; set one, since every answer ends with it.")
        description = json.loads(backend.to_str())
        self._prefix = _take_prefix(description)
        description.update(post_processor=None, truncation=None, padding=None)
        for token in description["added_tokens"]:
            token["special"] |= token["content"] in control_tokens
        self._pieces = tokenizers.Tokenizer.from_str(json.dumps(description))
        # A switch with a misleading name: it makes the four characters `</s>` text, not one special token.
        self._pieces.encode_special_tokens = True
        self.begin: list[int] = [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]
        self.end: int = tokenizer.eos_token_id
        self._own = {BOS: tokenizer.bos_token or "", EOS: tokenizer.eos_token}
        self._added = {token.content: (number, token) for number, token in tokenizer.added_tokens_decoder.items()}
        unknown = tokenizer.unk_token_id
        self._control = {token for token in tokenizer.all_special_ids if token != unknown}

    def __call__(self, text: str, *, at_start: bool = False, at_least: int | None = None) -> list[int]:
        """The ids of a piece of text.

        Args:
            text: to encode.
            at_start: whether the piece stands at the beginning of the prompt or behind an image, where the published
                code tokenises afresh and SentencePiece writes a blank first.
            at_least: of a long text, so many of the first ids are enough; None gives all.

        Raises:
            ValueError: if the tokenizer's vocabulary spells a control token as plain text, or the text holds half of a
                character.
        """
        if not text:
            return []
        if at_least is not None and len(text) > LONG_TEXT:
            end = self._safe_end(text, max(LONG_TEXT, _CHARACTERS * at_least))
            while end < len(text):
                ids = self(text[:end], at_start=at_start)
                if len(ids) >= at_least:
                    return ids
                end = self._safe_end(text, 2 * end)
        try:
            ids = self._pieces.encode(self._prefix + text if at_start else text).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise InputError(
                f"the text {text[:40]!a} holds half of a character (\\ud800 to \\udfff alone), which no tokenizer "
                "takes; write it whole."
            ) from error
        if not self._control.isdisjoint(ids):
            raise InputError(
                f"the tokenizer reads a control token out of the plain text {text[:80]!r}; rebuild it so that control "
                "tokens are added tokens and its pre-tokenizer splits their spelling."
            )
        return ids

    def spelling(self, token: str) -> str:
        """Spell a control token out that a template names; nothing for a first token that the tokenizer lacks."""
        return self._own.get(token, token)

    def control(self, token: str) -> list[int]:
        """The id of a control token that a template names; none of a first token that the tokenizer lacks.

        Raises:
            ValueError: if the tokenizer has no such added token.
        """
        spelled = self.spelling(token)
        if spelled and spelled not in self._added:
            raise InputError(
                f"the tokenizer has no token {spelled!r}, which the template writes; take a template of this language "
                "model's family, or template: tokenizer, the tokenizer's own."
            )
        return [self._added[spelled][0]] if spelled else []

    def lacks(self, tokens: Iterable[str]) -> list[str]:
        """Control tokens, of those that a template names, that the tokenizer has not."""
        return [token for token in tokens if self.spelling(token) not in self._added]

    def takes_blanks(self, token: str, side: Literal["before", "behind"]) -> bool:
        """Whether a control token swallows the blanks on one of its sides, as those of Phi-3 do behind them."""
        _, added = self._added.get(self.spelling(token), (0, None))
        return bool(added and (added.lstrip if side == "before" else added.rstrip))

    def _safe_end(self, text: str, least: int) -> int:
        """Place where a text can be cut so that the ids in front of the cut are those of the whole text.

        Tokens begin with a blank, if one does: so none reaches over the place in front of a blank between two words.
        Where a vocabulary has a token that does, or a text no such place, the text is not cut.
        """
        found = _BETWEEN_WORDS.search(text, least) if self._words_end_tokens else None
        return len(text) if found is None else found.start() + 1

    @functools.cached_property
    def _words_end_tokens(self) -> bool:
        return not any(_REACHES_OVER.search(token) for token in self._pieces.get_vocab(with_added_tokens=True))


def _take_prefix(description: dict[str, Any]) -> str:
    """Switch off the blank that SentencePiece-like tokenizers write first, and return it."""
    prefixed = False
    for place in ("normalizer", "pre_tokenizer"):
        step = description.get(place)
        parts = (step or {}).get("normalizers") or (step or {}).get("pretokenizers") or ([step] if step else [])
        for part in parts:
            if part["type"] == "Metaspace":
                prefixed |= part["prepend_scheme"] != "never"
                part["prepend_scheme"] = "never"
            elif part["type"] == "ByteLevel":
                prefixed |= part["add_prefix_space"]
                part["add_prefix_space"] = False
            elif part["type"] == "Prepend":
                prefixed = True
                part.update(type="Replace", pattern={"String": " "}, content=part.pop("prepend"))
    return " " if prefixed else ""
